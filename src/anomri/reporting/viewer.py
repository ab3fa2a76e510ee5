"""`anomri view`: a page on this machine for scrolling through scans, anomaly maps and masks with NiiVue.

Only what stands in a table made at the start is served; no path is ever made from a request.
"""

from __future__ import annotations

import json
import math
import shutil
import socketserver
import sys
import threading
import time
import webbrowser
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from types import TracebackType
from typing import Any

from anomri.errors import AnomriError
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.intake import CONVERTED, holds_dicom
from anomri.scans.names import SUFFIXES, bare_name

HOST = "127.0.0.1"
MAP_ENDING = "_anomaly.nii.gz"
CONTENT_SECURITY_POLICY = (
    # NiiVue draws its letters from an image in a data: URL; it needs no worker, WebAssembly or inline style.
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
    """A NIfTI file on disk; if ``inside`` is given, only as long as it lies in that folder, links followed."""

    path: Path
    inside: Path | None = None

    def resolve(self) -> Path | None:
        """The file itself, or ``None`` if it is gone, no NIfTI file by name, or led out of its folder."""
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


def serve(
    folder: str | Path,
    *,
    port: int = 0,
    scans: str | Path | Sequence[Case] | None = None,
    open_browser: bool = True,
) -> Viewer:
    """Serve the results in ``folder`` on 127.0.0.1 until the returned `Viewer` is closed.

    ``folder`` is what `detect_cohort` wrote; ``scans`` is what it was made from (default: what it converted from DICOM),
    shown behind the maps. Port 0 takes a free one. What is served is listed once, now. Links in ``folder`` that
    lead out of it are left out; those among ``scans``, which the user named, are followed. Every user of this
    machine can open the page.

    Raises `AnomriError` if ``folder`` holds no maps, ``scans`` none of their cases, or the port is taken.
    """
    viewer = Viewer(_table(Path(folder), _scans(Path(folder), scans)), port)
    if open_browser:
        _open_browser(viewer.url)
    return viewer


def view(
    folder: str | Path,
    *,
    port: int = 0,
    scans: str | Path | Sequence[Case] | None = None,
    open_browser: bool = True,
    announce: Callable[[str], None] = print,
) -> None:
    """As `serve`, and stay until Ctrl-C; ``announce`` is called with the page's address before a browser opens."""
    with serve(folder, port=port, scans=scans, open_browser=False) as viewer:
        announce(viewer.url)
        if open_browser:
            _open_browser(viewer.url)
        try:
            while True:
                time.sleep(1)
        except KeyboardInterrupt:
            return


def _scans(folder: Path, scans: str | Path | Sequence[Case] | None) -> dict[str, Case]:
    """The cases whose scans are shown, by name."""
    converted = folder / CONVERTED
    if scans is None:
        with suppress(AnomriError):  # a folder of that name may hold anything
            cases = find_cases(converted)
            return {
                case.name: case for case in cases if (folder / f"{case.name}{MAP_ENDING}").is_file()
            }
        return {}
    if not isinstance(scans, str | Path):
        return {case.name: case for case in scans}
    path = Path(scans)
    path = converted if converted.is_dir() and path.is_dir() and holds_dicom(path, folder) else path
    cases = find_cases(path)
    if (
        path.name.lower().endswith(SUFFIXES)
        and (folder / f"{bare_name(path)}{MAP_ENDING}").is_file()
    ):
        return {bare_name(path): cases[0]}  # one file, of which `detect` took all for its name
    return {case.name: case for case in cases}


def _open_browser(url: str) -> None:
    # In a thread: a browser in the terminal does not come back before it is left.
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()


def _table(folder: Path, scans: dict[str, Case]) -> Table:
    """Everything there is to serve, by request path."""
    root = folder.resolve()
    maps = [path for path in sorted(root.glob(f"[!.]*{MAP_ENDING}")) if Image(path, root).resolve()]
    if not maps:
        raise AnomriError(
            f"{folder}: holds no <case>{MAP_ENDING}; name the folder that `anomri detect` wrote."
        )
    names = [path.name.removesuffix(MAP_ENDING) for path in maps]
    if scans and not set(names) & set(scans):
        raise AnomriError(
            f"none of the scans is of a case in {folder} (scans: {_some(scans)}; cases: {_some(names)}); "
            f"name the scans that the maps were made from."
        )
    table: Table = {}
    cases = [
        _list_case(table, number, root, name, scans.get(name)) for number, name in enumerate(names)
    ]
    cases.sort(key=lambda case: (-(case["volume_mm3"] or 0), case["name"]))
    listing = json.dumps({"folder": root.name, "cases": cases}, allow_nan=False)
    static = files("anomri") / "static" / "niivue"
    script = "text/javascript; charset=utf-8"
    return {
        **table,
        "/": Page(_page(root.name).encode(errors="replace"), "text/html; charset=utf-8"),
        "/niivue.js": Page((static / "niivue.umd.js").read_bytes(), script),
        "/view.js": Page((static / "view.js").read_bytes(), script),
        "/view.css": Page((static / "view.css").read_bytes(), "text/css; charset=utf-8"),
        "/cases.json": Page(listing.encode(), "application/json"),
    }


def _list_case(
    table: Table, number: int, root: Path, name: str, scan: Case | None
) -> dict[str, Any]:
    """Add the images of one case to ``table``; returns its entry in the listing."""

    def offer(image: Image, kind: str) -> str | None:
        if image.resolve() is None:
            return None
        # NiiVue tells the format by the ending; the rest of the name says nothing of the patient.
        ending = ".nii.gz" if image.path.name.lower().endswith(".gz") else ".nii"
        url = f"/volumes/{number}/{kind}{ending}"
        table[url] = image
        return url

    summary = _summary(root / f"{name}.json", root)
    anomaly = offer(Image(root / f"{name}{MAP_ENDING}", root), "anomaly")
    mask = offer(Image(root / f"{name}_mask.nii.gz", root), "mask")
    reconstruction = offer(Image(root / f"{name}_reconstruction.nii.gz", root), "reconstruction")
    backgrounds: list[dict[str, object]] = []
    for channel, path in (scan.channels if scan else {}).items():
        url = offer(Image(path), f"scan-{len(backgrounds)}")
        if url:
            backgrounds.append({"label": channel, "url": url, "frame": 0})
    if reconstruction:
        for frame, channel in enumerate(summary["channels"] or [""]):
            label = f"reconstruction {channel}".strip()
            backgrounds.append({"label": label, "url": reconstruction, "frame": frame})
    backgrounds.append({"label": "anomaly map", "url": anomaly, "frame": 0})
    # Lesions show best on FLAIR.
    backgrounds.sort(key=lambda background: background["label"] != "flair")
    return {"name": name, **summary, "anomaly": anomaly, "mask": mask, "backgrounds": backgrounds}


def _summary(path: Path, root: Path) -> dict[str, Any]:
    """What the page shows of ``<case>.json``; ``None`` for what is not there or is not what it should be."""
    try:
        resolved = path.resolve(strict=True)
        facts = (
            json.loads(resolved.read_text(encoding="utf-8"))
            if resolved.is_relative_to(root)
            else {}
        )
    except (OSError, RuntimeError, ValueError):
        facts = {}
    facts = facts if isinstance(facts, dict) else {}
    lesions = facts.get("lesions")
    channels = facts.get("channels")
    return {
        "threshold": _number(facts.get("threshold")),
        "volume_mm3": _number(facts.get("lesion_volume_mm3")),
        "channels": [str(channel) for channel in channels] if isinstance(channels, list) else [],
        "lesions": [_lesion(one) for one in lesions if isinstance(one, dict)]
        if isinstance(lesions, list)
        else None,
    }


def _lesion(lesion: dict[str, Any]) -> dict[str, Any]:
    centroid = lesion.get("centroid_mm")
    place = [_number(value) for value in centroid] if isinstance(centroid, list) else []
    return {
        **{
            key: _number(lesion.get(key))
            for key in ("lesion", "volume_mm3", "peak", "mean", "confidence")
        },
        "centroid_mm": place if len(place) == 3 and None not in place else None,
    }


def _number(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def _some(names: Sequence[str] | dict[str, Case], most: int = 3) -> str:
    return ", ".join(list(names)[:most]) + (", ..." if len(names) > most else "")


def _page(title: str) -> str:
    from jinja2 import Environment, PackageLoader  # slow to import

    environment = Environment(
        loader=PackageLoader("anomri"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("view.html.j2").render(title=title, version=version("anomri"))


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
            # A foreign name that points here is a page elsewhere trying to read the scans (DNS rebinding).
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
