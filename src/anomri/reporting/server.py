"""A server on this machine that gives what stands in a table made at the start, and nothing else.

No path is ever made from a request.
"""

from __future__ import annotations

import shutil
import socketserver
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

from anomri.errors import AnomriError
from anomri.scans.names import SUFFIXES

HOST = "127.0.0.1"
CONTENT_SECURITY_POLICY = (
    # NiiVue draws its letters from an image in a data: URL; it needs no worker, WebAssembly or
    # inline style.
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


@dataclass(frozen=True)
class Page:
    """Something made here: its bytes and their type."""

    content: bytes
    type: str


@dataclass(frozen=True)
class Image:
    """A NIfTI file on disk; if ``inside`` is given, only as long as it lies in that folder, links
    followed."""

    path: Path
    inside: Path | None = None

    def resolve(self) -> Path | None:
        """The file itself, or ``None`` if it is gone, no NIfTI file by name, or led out of its
        folder."""
        try:
            path = self.path.resolve(strict=True)
        except (OSError, RuntimeError):
            return None
        if self.inside is not None and not path.is_relative_to(self.inside):
            return None
        return path if path.is_file() and path.name.lower().endswith(SUFFIXES) else None


Table = dict[str, Page | Image]


class Viewer:
    """The running server: ``url`` is the page, `close` ends it. Also a context manager."""

    def __init__(self, table: Table, port: int = 0) -> None:
        try:
            self._server = _Server((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise AnomriError(
                f"port {port}: cannot listen on it ({error}); name another with --port, or leave it out."
            ) from error
        self._server.table = table
        self.url = f"http://{HOST}:{self._server.server_address[1]}/"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Server(ThreadingHTTPServer):
    table: Table
    daemon_threads = True

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks the name service for this machine's name.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = HOST, self.server_address[1]

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A browser that leaves in the middle of a file is no error.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 60  # seconds until a silent connection is given up

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _refuse_method(self) -> None:
        self._reply(405, b"only GET and HEAD\n", {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse_method  # noqa: N815

    def _answer(self) -> None:
        host = self.headers.get("Host", "").rsplit(":", 1)[0].lower()
        if host not in (HOST, "localhost"):
            # A foreign name that points here is a page elsewhere trying to read the scans (DNS
            # rebinding).
            return self._reply(403, b"ask for 127.0.0.1 or localhost\n")
        found = self.server.table.get(self.path.partition("?")[0])
        if isinstance(found, Page):
            return self._reply(200, found.content, {"Content-Type": found.type})
        path = found.resolve() if found else None
        if path is None:
            return self._reply(404, b"not found\n")
        try:
            file = path.open("rb")
        except OSError:
            return self._reply(404, b"cannot be read\n")
        with file:
            size = path.stat().st_size
            self._reply(
                200, None, {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
            )
            if self.command != "HEAD":
                shutil.copyfileobj(file, self.wfile, 1 << 20)

    def _reply(
        self, status: int, content: bytes | None, headers: dict[str, str] | None = None
    ) -> None:
        headers = {"Content-Type": "text/plain; charset=utf-8", **(headers or {})}
        if content is not None:
            headers["Content-Length"] = str(len(content))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if content is not None and self.command != "HEAD":
            self.wfile.write(content)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def version_string(self) -> str:
        return "anomri"

    def log_message(self, format: str, *args: object) -> None:
        """Requests are not logged: their count says nothing to a user."""
