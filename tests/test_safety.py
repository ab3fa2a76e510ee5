"""What a stranger hands over runs no code and takes no memory; what a header says of a patient
stays there.

More of the same: `test_viewer` (loopback, policy, ``..``, links), `test_reporting` (escaping in a
real browser), `test_dicom` (identifiers), `test_bids` (a pickle in a data set), `test_cli`
(checkpoints), `test_bad_input` (images).
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import resource
import shutil
import struct
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch

import anomri
from anomri.errors import AnomriError
from anomri.model.detector import Detector
from anomri.model.files import write_model
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.spec import Grid, ModelSpec, Scaling
from anomri.training.packing import pack_cohort
from anomri.training.state import TrainingState
from anomri.training.train import train
from conftest import write_case

ROOM_MB = 400
"""What refusing a file may take, far below what the files here ask for."""


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


@pytest.fixture
def stranger(model: Path, tmp_path: Path) -> Path:
    """A model folder to tamper with."""
    return Path(shutil.copytree(model, tmp_path / "stranger"))


def described(folder: Path, **changes: object) -> None:
    """Change entries of a model's description."""
    facts = json.loads((folder / "model.json").read_text())
    for name, value in changes.items():
        facts[name] = {**facts[name], **value} if isinstance(value, dict) else value
    (folder / "model.json").write_text(json.dumps(facts))


def refused(folder: Path, message: str) -> None:
    begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(AnomriError, match=message):
        Detector.load(folder, "cpu")
    assert time.monotonic() - begun < 5
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < ROOM_MB


def test_no_pickle_is_loaded_from_a_model_a_cache_or_a_run(
    stranger: Path, cohort: Path, model: Path, tmp_path: Path
) -> None:
    mark = tmp_path / "was-here"
    bomb = pickle.dumps(Evil(mark), protocol=2)
    (stranger / "weights.safetensors").write_bytes(bomb)
    refused(stranger, "weights.safetensors: does not contain the weights")
    torch.save(Evil(mark), stranger / "weights.safetensors")
    refused(stranger, "weights.safetensors")
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    for content in (bomb, None):
        if content is None:
            torch.save({"step": 1, "network": Evil(mark)}, unfinished / TrainingState.NAME)
        else:
            (unfinished / TrainingState.NAME).write_bytes(content)
        with pytest.raises(AnomriError, match=r"training.pt: is damaged"):
            train(cohort, unfinished, preset="tiny", cache=tmp_path / "cache", resume=True)
    (packed,) = pack_cohort(
        find_cases(cohort)[:1], ("flair",), Grid(), Scaling(), tmp_path / "cache"
    )
    sound, sidecar = packed.file.read_bytes(), packed.file.with_suffix(".json")
    np.save(packed.file, np.array([Evil(mark)] * packed.slices, dtype=object), allow_pickle=True)
    sidecar.write_text(
        sidecar.read_text().replace(
            f'"bytes": {len(sound)}', f'"bytes": {packed.file.stat().st_size}'
        )
    )
    packed.read([0])
    assert packed.file.read_bytes() == sound
    # Scores that an evaluation left behind.
    place = tmp_path / "out" / ".scores"
    place.mkdir(parents=True)
    for name in ("case7", "case8"):
        np.savez(place / f"{name}.npz", scores=np.array([Evil(mark)], dtype=object))
    anomri.evaluate(cohort, tmp_path / "out", model=model)
    assert not mark.exists()


@pytest.mark.parametrize("file", ["model.json", "weights.safetensors", "splits.csv"])
def test_links_to_devices_pipes_and_folders_are_not_opened(
    stranger: Path, tmp_path: Path, file: str
) -> None:
    os.mkfifo(tmp_path / "pipe")
    for target in (Path("/dev/zero"), tmp_path / "pipe", tmp_path, Path("/proc/self/mem")):
        (stranger / file).unlink()
        (stranger / file).symlink_to(target)
        if file == "splits.csv" and not target.is_file():
            Detector.load(stranger, "cpu")  # as if there were none
        else:
            refused(stranger, "not read|has no model.json|cannot be read|cannot read|weights")


def test_writing_a_model_does_not_follow_links(stranger: Path, model: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in ("model.json", "weights.safetensors"):
        (stranger / name).unlink()
        (stranger / name).symlink_to(precious)
    detector = Detector.load(model, "cpu")
    write_model(stranger, detector.spec, detector._state)
    assert precious.read_text() == "mine"
    assert Detector.load(stranger, "cpu").spec == detector.spec


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "a\\b", "x\0y", "x\ny"])
def test_no_case_name_puts_files_outside_the_folder(
    cohort: Path, model: Path, tmp_path: Path, name: str
) -> None:
    scan = cohort / "case0" / "case0_flair.nii.gz"
    table = tmp_path / "cohort.tsv"
    table.write_text(f'case\tflair\tt1\n"{name}"\t{scan}\t{scan}\n')
    with pytest.raises(
        AnomriError, match="case .* is empty, named twice or holds a '/'|cannot read the table"
    ):
        find_cases(table)
    with pytest.raises(AnomriError, match="cannot name its files"):
        anomri.detect_cohort([Case(name, {"flair": scan, "t1": scan})], tmp_path / "out", model)
    assert sorted(path.name for path in tmp_path.iterdir()) in (
        ["cohort.tsv"],
        ["cohort.tsv", "out"],
    )


def test_paths_in_a_model_are_not_followed(stranger: Path, cohort: Path, tmp_path: Path) -> None:
    (stranger / "splits.csv").write_text("case,split\n../../../etc/passwd,train\n")
    assert Detector.load(stranger, "cpu").splits == {
        "../../../etc/passwd": "train"
    }  # compared with, never opened
    described(stranger, method="../../evil")
    refused(stranger, "there is no method")
    described(stranger, method="os:system")
    refused(stranger, "there is no method")


@pytest.mark.parametrize("header", [2**63, 2**40, 10**8 + 1, 3])
def test_giant_headers_of_weights_are_refused(stranger: Path, header: int) -> None:
    (stranger / "weights.safetensors").write_bytes(struct.pack("<Q", header) + b"{}" + bytes(100))
    refused(stranger, "weights.safetensors: does not contain the weights")


def test_weights_that_are_nan_or_infinite_are_refused(stranger: Path) -> None:
    path = stranger / "weights.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + np.float32(np.nan).tobytes())
    refused(stranger, "weights.safetensors: is damaged .* contains NaN")


def test_an_unknown_split_is_refused(stranger: Path) -> None:
    (stranger / "splits.csv").write_text("case,split\ncase0,train\ncase1,tr")
    refused(stranger, "splits.csv, line 3: split 'tr' is not one of train, val, test")


def test_a_giant_weights_file_is_refused_unread(stranger: Path) -> None:
    with (stranger / "weights.safetensors").open("r+b") as file:
        file.truncate(2**40)  # takes no room on the disk
    refused(stranger, "weights.safetensors: has 1,099,511,627,776 bytes, more than")
    with (stranger / "model.json").open("r+b") as file:
        file.truncate(2**40)
    refused(stranger, "model.json: has .* bytes, more than")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"settings": {"widths": [10**9, 10**9]}},
            "does not describe a model .its setting widths is 1e\\+09",
        ),
        (
            {"settings": {"widths": [10**5] * 4}},
            "it describes .* bytes of numbers, but the weights have",
        ),
        ({"settings": {"widths": [1] * 100_000}}, "setting widths has 100,000 entries"),
        (
            {"settings": {"widths": [[[4]]]}},
            "model.json: the setting widths of dae: input should be",
        ),
        ({"settings": {"widths": "abcd"}}, "model.json: the setting widths of dae: "),
        ({"settings": {"widths": [-4, 8]}}, "does not describe a model|do not fit"),
        ({"settings": {"noise_resolution": 1e300}}, "setting noise_resolution is 1e\\+300"),
        (
            {"method": "diffusion", "settings": {"steps": 10**12}},
            "do not fit|setting steps is 1e\\+12",
        ),
        ({"grid": {"size": [10**6, 10**6]}}, "its working grid is"),
        ({"score": {"median": 10**9}}, "its setting median is 1e\\+09"),
        ({"thresholds": {"default_rate": 0.0031}}, "its thresholds do not fit each other"),
        ({"thresholds": {"value": [1.0]}}, "its thresholds do not fit each other"),
    ],
)
def test_a_model_that_needs_too_much_memory_is_refused(
    stranger: Path, changes: dict[str, object], message: str
) -> None:
    described(stranger, **changes)
    refused(stranger, message)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 500_000,
        '{"settings": ' + '{"a": ' * 50_000 + "1" + "}" * 50_050,
        '{"format_version": ' + "9" * 500_000 + "}",
        '{"channels": [' + '"a",' * 100_000 + '"a"]}',
        '{"channels": ["a"], "channels": ["' + "b" * 500_000 + '"]}',
        "\0" * 1000,
        '"\\ud800"',
    ],
)
def test_json_bombs_are_refused_at_once(stranger: Path, text: str) -> None:
    (stranger / "model.json").write_text(text)
    refused(stranger, "model.json|does not contain the weights")


IDENTIFIER = b"DOE^JOHN"


def planted(path: Path) -> None:
    """Write a patient's name wherever a NIfTI file, or the gzip around it, has room for text."""
    image = nib.load(path)
    content = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine, image.header)
    for field in ("descrip", "aux_file", "intent_name", "db_name", "data_type"):
        content.header[field] = IDENTIFIER
    content.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"name " + IDENTIFIER))
    with (
        path.open("wb") as raw,
        gzip.GzipFile(IDENTIFIER.decode() + ".nii", "wb", fileobj=raw) as packed,
    ):
        packed.write(content.to_bytes())


def test_patient_data_in_headers_reaches_no_output(cohort: Path, tmp_path: Path) -> None:
    shutil.copytree(cohort, tmp_path / "scans")
    for path in (tmp_path / "scans").rglob("*.nii.gz"):
        planted(path)
    assert IDENTIFIER in gzip.decompress(path.read_bytes()) and IDENTIFIER in path.read_bytes()[:60]
    out = tmp_path / "out"
    arguments = {"preset": "tiny", "training": {"steps": 1}, "device": "cpu"}
    train(tmp_path / "scans", out / "model", cache=out / "cache", **arguments)  # type: ignore[arg-type]
    anomri.detect_cohort(tmp_path / "scans", out / "maps", out / "model", reconstruction=True)
    anomri.evaluate(tmp_path / "scans", out / "figures", model=out / "model")
    files = [path for path in out.rglob("*") if path.is_file()]
    assert len(files) > 60
    for path in files:
        content = path.read_bytes()
        content += gzip.decompress(content) if path.suffix == ".gz" else b""
        assert IDENTIFIER not in content, path


def test_a_case_name_with_markup_is_shown_as_text(model: Path, tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>&'\""
    write_case(tmp_path / "scans", name.replace("/", ""), 3, lesion=True)
    anomri.detect_cohort(tmp_path / "scans", tmp_path / "out", model)
    anomri.evaluate(tmp_path / "scans", tmp_path / "figures", model=model)
    for folder in ("out", "figures"):
        page = (tmp_path / folder / "report.html").read_text()
        assert "<img src=x" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
        assert "default-src 'none'" in page
    ModelSpec.read(model / "model.json")


def test_no_case_has_the_name_of_a_file_of_the_run(
    cohort: Path, model: Path, tmp_path: Path
) -> None:
    case = Case("run", dict(find_cases(cohort)[0].channels))
    with pytest.raises(
        AnomriError, match="a case is called 'run', which cannot name its files; rename it"
    ):
        anomri.detect_cohort([case], tmp_path / "out", model)
