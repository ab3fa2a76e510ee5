"""The viewer's server gives what it lists and nothing else, and its page shows the volumes in a
real browser."""

from __future__ import annotations

import hashlib
import html
import http.client
import json
import re
import shutil
import socket
import subprocess
import threading
from importlib.resources import files
from pathlib import Path
from urllib.parse import urlsplit

import nibabel as nib
import numpy as np
import pytest

from anomri.errors import AnomriError
from anomri.reporting import viewer as module
from anomri.reporting.server import Page, Viewer
from anomri.reporting.viewer import serve, view
from anomri.runs.detect import detect_cohort
from conftest import CHROMIUM, CHROMIUM_FLAGS

NAME = "b<i>&'2"  # a name that is markup
SHAPE = (20, 24, 16)
CENTRES = ((6, 10, 9), (14, 16, 5))
# Oblique, the first axis to the left: an alignment that is wrong anywhere gives another value at
# the crosshair.
TURN = np.deg2rad(12)
AFFINE = np.array(
    [
        [-3 * np.cos(TURN), -3 * np.sin(TURN), 0, 31],
        [-3 * np.sin(TURN), 3 * np.cos(TURN), 0, -27],
        [0, 0, 4, -20],
        [0, 0, 0, 1],
    ]
)


def save(path: Path, data: np.ndarray, display: tuple[float, float] = (0, 0)) -> None:
    image = nib.Nifti1Image(data, AFFINE)
    image.header["cal_min"], image.header["cal_max"] = display
    nib.save(image, path)


def anomaly_map() -> np.ndarray:
    """Two spheres over a slope: no voxel has the value of its neighbours."""
    place = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij")) - 0.0
    score = 0.01 + np.tensordot([0.001, 0.0013, 0.0021], place, axes=1)
    for centre, radius in zip(CENTRES, (4, 3), strict=True):
        score += 0.3 * (((place - np.reshape(centre, (3, 1, 1, 1))) ** 2).sum(0) < radius**2)
    return score.astype(np.float32)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as `detect` writes it: one case with lesions, one with a map only; the scans lie
    in ``scans``."""
    out, scans = tmp_path / "out", tmp_path / "scans"
    out.mkdir()
    scans.mkdir()
    score = anomaly_map()
    lesions = [
        {
            "lesion": number + 1,
            "volume_mm3": 1000.0 - number,
            "centroid_mm": list(nib.affines.apply_affine(AFFINE, centre)),
            "peak": 0.4,
            "mean": float("nan"),
        }
        for number, centre in enumerate(CENTRES)
    ]
    facts = {
        "threshold": 0.2,
        "lesion_volume_mm3": 1999.0,
        "lesions": lesions,
        "channels": ["flair", "t1"],
    }
    save(out / f"{NAME}_anomaly.nii.gz", score, (0.1, 0.4))
    save(out / f"{NAME}_mask.nii.gz", (score > 0.2).astype(np.uint8), (0, 1))
    save(out / f"{NAME}_reconstruction.nii.gz", np.stack([score * 10, score * 20], axis=-1))
    (out / f"{NAME}.json").write_text(json.dumps(facts))
    save(out / "a_anomaly.nii.gz", score)
    (out / "report.html").write_text("private")
    for channel, factor in (("t1", 500), ("flair", 1000)):
        save(scans / f"{NAME}_{channel}.nii.gz", (score * factor).astype(np.float32))
    return out


def ask(
    server: Viewer, path: str, method: str = "GET", host: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=host is not None)
        if host:
            connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_the_viewer_lists_the_cases_and_serves_their_files(results: Path) -> None:
    with serve(results, scans=results.parent / "scans", open_browser=False) as server:
        listing = json.loads(ask(server, "/cases.json")[2])
        first, second = listing["cases"]
        assert (listing["folder"], first["name"], second["name"]) == ("out", NAME, "a")
        assert (
            first["threshold"] == 0.2 and first["volume_mm3"] == 1999 and len(first["lesions"]) == 2
        )
        place = ", ".join(
            f"{mm:.0f}" for mm in nib.affines.apply_affine(AFFINE, CENTRES[0])
        ).replace("-", "\u2212")
        # The mean is not a number, which JSON does not know; a confidence and distances are not
        # there.
        assert first["lesions"][0]["cells"] == ["1", "1.00", place, "0.40"] + ["-"] * 4
        assert [one["heading"] for one in listing["columns"]][:2] == ["#", "ml"]
        labels = [background["label"] for background in first["backgrounds"]]
        assert labels == ["flair", "t1", "reconstruction flair", "reconstruction t1", "anomaly map"]
        assert [background["frame"] for background in first["backgrounds"]] == [0, 0, 0, 1, 0]
        assert second["lesions"] is None and second["mask"] is None and second["threshold"] is None
        assert [background["label"] for background in second["backgrounds"]] == ["anomaly map"]
        expected = {
            first["anomaly"]: results / f"{NAME}_anomaly.nii.gz",
            first["mask"]: results / f"{NAME}_mask.nii.gz",
            first["backgrounds"][0]["url"]: results.parent / "scans" / f"{NAME}_flair.nii.gz",
            first["backgrounds"][3]["url"]: results / f"{NAME}_reconstruction.nii.gz",
            second["anomaly"]: results / "a_anomaly.nii.gz",
        }
        for url, path in expected.items():
            status, headers, content = ask(server, url)
            assert status == 200 and content == path.read_bytes()
            assert (
                headers["Content-Type"] == "application/octet-stream"
                and "Content-Encoding" not in headers
            )


def test_scans_are_found_at_the_paths_the_run_recorded(
    model: Path, cohort: Path, tmp_path: Path
) -> None:
    out, scans = tmp_path / "out", tmp_path / "scans"
    for name in ("case7", "case8"):
        shutil.copytree(cohort / name, scans / name)
    detect_cohort(scans, out, model)
    (scans / "case8" / "case8_t1.nii.gz").unlink()  # what is gone is left out
    (out / "logs" / "case7.json").write_text("{")  # and a damaged record is not in the way
    with serve(out, open_browser=False) as server:
        cases = {case["name"]: case for case in json.loads(ask(server, "/cases.json")[2])["cases"]}
        labels = {
            name: [one["label"] for one in case["backgrounds"]] for name, case in cases.items()
        }
        assert labels == {"case7": ["anomaly map"], "case8": ["flair", "anomaly map"]}
        shown = ask(server, cases["case8"]["backgrounds"][0]["url"])[2]
        assert shown == (scans / "case8" / "case8_flair.nii.gz").read_bytes()


def test_every_response_has_strict_security_headers(results: Path) -> None:
    with serve(results, open_browser=False) as server:
        for path, status in (("/", 200), ("/view.js", 200), ("/nothing", 404)):
            code, headers, _ = ask(server, path)
            assert code == status
            policy = headers["Content-Security-Policy"]
            assert (
                policy.startswith("default-src 'none'")
                and "unsafe" not in policy
                and "http" not in policy
            )
            assert (
                headers["X-Content-Type-Options"] == "nosniff"
                and headers["Referrer-Policy"] == "no-referrer"
            )
            assert headers["Cache-Control"] == "no-store" and headers["Server"] == "anomri"
        assert b"<script>" not in ask(server, "/")[2] and b"style=" not in ask(server, "/")[2]


@pytest.mark.parametrize(
    "path",
    [
        "/report.html",
        "/cases.tsv",
        "/../out/report.html",
        "/volumes/0/../../report.html",
        "/%2e%2e/out/report.html",
        "/volumes/0/%2e%2e%2freport.html",
        "/a_anomaly.nii.gz",
        "/volumes/9/anomaly.nii.gz",
        "/volumes/0/anomaly.nii.gz/",
        "/volumes/0/anomaly.nii.gz%00",
        "//etc/passwd",
        "/etc/passwd",
        "http://127.0.0.1/etc/passwd",
        "*",
        "\\..\\report.html",
    ],
)
def test_no_other_file_is_served(results: Path, path: str) -> None:
    with serve(results, open_browser=False) as server:
        host, port = urlsplit(server.url).netloc.split(":")
        with socket.create_connection((host, int(port)), timeout=10) as raw:
            raw.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode())
            answer = b"".join(iter(lambda: raw.recv(65536), b""))
        assert answer.split(b"\r\n")[0].split()[1] == b"404" and answer.endswith(
            b"\r\n\r\nnot found\n"
        )


def test_only_this_machine_may_connect_and_only_to_read(results: Path) -> None:
    with serve(results, open_browser=False) as server:
        assert server._server.server_address[0] == "127.0.0.1"
        for host in ("127.0.0.1", "localhost:8000", "LOCALHOST"):
            assert ask(server, "/cases.json", host=host)[0] == 200
        for host in (
            "evil.example",
            "127.0.0.1.evil.example",
            "localhost.evil.example:80",
            "[::1]",
            " ",
        ):
            assert ask(server, "/cases.json", host=host)[0] == 403
        for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
            status, headers, _ = ask(server, "/", method)
            assert status == 405 and headers["Allow"] == "GET, HEAD"
        status, headers, content = ask(server, "/niivue.js", "HEAD")
        assert status == 200 and int(headers["Content-Length"]) > 2e6 and content == b""


def test_links_that_lead_out_are_not_followed(results: Path) -> None:
    secret = results.parent / "secret_anomaly.nii.gz"
    secret.write_bytes(b"secret")
    (results / "0_anomaly.nii.gz").symlink_to(secret)
    (results / "a_mask.nii.gz").symlink_to(secret)
    (results.parent / "a.json").write_text('{"threshold": 7}')
    (results / "a.json").symlink_to(results.parent / "a.json")
    (results.parent / "scans" / "a_flair.nii.gz").symlink_to("/etc/passwd")
    (results / "d_anomaly.nii.gz").symlink_to(results / "a_anomaly.nii.gz")  # stays inside
    with serve(results, scans=results.parent / "scans", open_browser=False) as server:
        cases = {case["name"]: case for case in json.loads(ask(server, "/cases.json")[2])["cases"]}
        assert set(cases) == {NAME, "a", "d"}
        assert cases["a"]["mask"] is None and cases["a"]["threshold"] is None
        assert [background["label"] for background in cases["a"]["backgrounds"]] == ["anomaly map"]
        # Also a link that is put in a file's place later.
        (results / "a_anomaly.nii.gz").unlink()
        (results / "a_anomaly.nii.gz").symlink_to(secret)
        assert ask(server, cases["a"]["anomaly"])[0] == 404


@pytest.mark.parametrize(
    "text",
    ["", "[1]", "\xff", '{"lesions": 3, "channels": 4}', '{"lesions": [2, {}], "threshold": "x"}'],
)
def test_a_damaged_summary_does_not_stop_the_viewer(results: Path, text: str) -> None:
    (results / "a.json").write_text(text, encoding="latin-1")
    with serve(results, open_browser=False) as server:
        case = next(
            case
            for case in json.loads(ask(server, "/cases.json")[2])["cases"]
            if case["name"] == "a"
        )
    assert case["threshold"] is None and case["channels"] == []


def test_folders_and_ports_that_do_not_fit_are_refused_with_the_reason(
    results: Path, tmp_path: Path
) -> None:
    with pytest.raises(AnomriError, match=r"holds no <case>_anomaly.nii.gz; name the folder"):
        serve(tmp_path / "scans", open_browser=False)
    save(tmp_path / "other_flair.nii.gz", anomaly_map())
    with pytest.raises(
        AnomriError, match="none of the scans is of a case in .*scans: other; cases: a, b"
    ):
        serve(results, scans=tmp_path / "other_flair.nii.gz", open_browser=False)
    with (
        serve(results, open_browser=False) as server,
        pytest.raises(AnomriError, match="name another with --port"),
    ):
        serve(results, port=urlsplit(server.url).port or 0, open_browser=False)


def test_view_stays_until_interrupted(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, told, seen = list[str](), list[str](), threading.Event()
    monkeypatch.setattr(module.webbrowser, "open", lambda url: (opened.append(url), seen.set()))

    def interrupt(seconds: float) -> None:
        assert seen.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    view(results, announce=told.append)
    assert opened == told and told[0].startswith("http://127.0.0.1:")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", urlsplit(told[0]).port or 0), timeout=5)


def test_the_niivue_file_is_the_documented_version() -> None:
    folder = files("anomri") / "static" / "niivue"
    sum_ = hashlib.sha256((folder / "niivue.umd.js").read_bytes()).hexdigest()
    assert (
        sum_ in (folder / "README.md").read_text() and "Niivue" in (folder / "LICENSE").read_text()
    )


WATCH = """
document.body.dataset.broken = ''
addEventListener('securitypolicyviolation', (event) => (document.body.dataset.broken += event.violatedDirective + ' '))
addEventListener('error', (event) => (document.body.dataset.broken += event.message + ' '))
"""
TRY = """
async function settle() {
  do await new Promise((after) => setTimeout(after, 30)); while (document.body.dataset.state === 'loading')
  viewer.updateGLVolume()
}
function look(name) {
  viewer.drawScene()
  const { gl } = viewer, pixels = new Uint8Array(4 * gl.canvas.width * gl.canvas.height)
  gl.readPixels(0, 0, gl.canvas.width, gl.canvas.height, gl.RGBA, gl.UNSIGNED_BYTE, pixels)
  let warm = 0, rim = 0, grey = 0
  for (let k = 0; k < pixels.length; k += 4) {
    const [r, g, b] = pixels.slice(k, k + 3)
    if (r > 100 && r > 1.6 * b) warm++
    if (Math.abs(r - 51) < 5 && Math.abs(g - 230) < 5 && b > 250) rim++
    if (r > 20 && r === g && g === b) grey++
  }
  const text = (id) => byId(id).textContent
  results[name] = {
    warm, rim, grey, place: text('place'), scan: text('background-at'), anomaly: text('anomaly-at'),
    mask: text('mask-at'), threshold: text('threshold-value')
  }
}
function set(id, value) {
  byId(id).value = value
  byId(id).dispatchEvent(new Event(byId(id).tagName === 'SELECT' ? 'change' : 'input'))
}
const results = {}
async function run() {
  await settle(); look('start')
  set('mask', 'off'); await settle(); look('unmasked')
  set('threshold', 0.35); await settle(); look('raised')
  byId('reset').click(); await settle(); look('reset')
  byId('lesions').tBodies[0].rows[1].click(); await settle(); look('second')
  set('background', 3); await settle(); look('reconstruction')
  byId('canvas').dispatchEvent(new KeyboardEvent('keydown', { key: 'PageUp', bubbles: true })); look('up')
  cases[1].button.click(); await settle(); look('other')
}
run().catch((error) => (results.error = String(error))).finally(() => {
  element('pre', JSON.stringify(results), document.body).id = 'results'
})
"""
FLAGS = [
    *CHROMIUM_FLAGS,
    "--use-gl=angle",
    "--use-angle=swiftshader",
    "--enable-unsafe-swiftshader",
    "--window-size=900,500",
    "--virtual-time-budget=30000",
]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_shows_the_volumes(results: Path, tmp_path: Path) -> None:
    with serve(results, scans=tmp_path / "scans", open_browser=False) as server:
        table = server._server.table
        script = table["/view.js"]
        assert isinstance(script, Page)
        table["/view.js"] = Page(WATCH.encode() + script.content + TRY.encode(), script.type)
        command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", server.url]
        dom = subprocess.run(command, capture_output=True, text=True, timeout=90).stdout
    if "Unable to initialize WebGL2" in dom:
        pytest.skip("this Chromium has no WebGL2")
    assert 'data-state="ready"' in dom and 'data-broken=""' in dom, dom[:700] + dom[-2500:]
    assert "b&lt;i&gt;&amp;'2" in dom and "<i>" not in dom
    found = re.search(r'<pre id="results">(.*?)</pre>', dom)
    assert found is not None, dom[-2000:]
    seen = json.loads(html.unescape(found[1]))
    assert "error" not in seen, seen["error"]
    score = anomaly_map()
    start, second = seen["start"], seen["second"]
    for view_, centre, factor in ((start, CENTRES[0], 1000), (second, CENTRES[1], 1000)):
        assert float(view_["anomaly"]) == pytest.approx(score[centre], abs=6e-5)
        assert float(view_["scan"]) == pytest.approx(score[centre] * factor, rel=1e-3)
        assert view_["mask"] == "inside"
        place = [
            float(value)
            for value in view_["place"].replace("\u2212", "-").removesuffix(" mm").split(",")
        ]
        assert place == pytest.approx(nib.affines.apply_affine(AFFINE, centre), abs=0.06)
    assert start["threshold"] == "0.200" == seen["reset"]["threshold"]
    assert min(start["warm"], start["rim"], start["grey"]) > 100
    assert seen["unmasked"]["rim"] == 0 and seen["unmasked"]["warm"] >= start["warm"]
    assert (
        seen["raised"]["warm"] < 0.7 * start["warm"]
        and seen["reset"]["warm"] == seen["unmasked"]["warm"]
    )
    assert float(seen["reconstruction"]["scan"]) == pytest.approx(score[CENTRES[1]] * 20, rel=1e-3)
    assert seen["reconstruction"]["place"] == second["place"]
    up = (CENTRES[1][0], CENTRES[1][1], CENTRES[1][2] + 1)
    assert float(seen["up"]["anomaly"]) == pytest.approx(score[up], abs=6e-5)
    peak = np.unravel_index(score.argmax(), SHAPE)  # a case without a table opens at its peak
    assert (
        float(seen["other"]["anomaly"]) == pytest.approx(score[peak], abs=6e-5)
        and seen["other"]["mask"] == "-"
    )
