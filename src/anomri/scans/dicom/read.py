"""DICOM in: the MR series of a folder, which channel each one is, and their images as NIfTI without a name.

A NIfTI file written here holds voxels and a position, nothing else of the headers; file names and case names hold
a hash of the study's UID. Only ``keep_identifiers=True`` lets the PatientID out, as part of the case's name.
Messages name files and SeriesDescription, free text which a scanner's user may have written anything into.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.files import output_folder
from anomri.scans.case import Case
from anomri.scans.dicom.channels import Series, guess_channel
from anomri.scans.dicom.files import (
    REASONS,
    check_pixels,
    import_dicom,
    number_of,
    quiet,
    read_header,
    read_whole,
    reason_of,
    regular_files,
    text_of,
)
from anomri.scans.geometry import Geometry
from anomri.scans.names import ANNOTATIONS
from anomri.scans.nifti import read_image, write_image_file
from anomri.scans.volume import image_of

MIN_SLICES = 10
"""Series with fewer slices are taken for localizers."""
STEP_TOLERANCE = 0.05
"""How much the distance between two slices may differ from the others, as a share of it."""
MR_IMAGE = "1.2.840.10008.5.1.4.1.1.4"


def find_series(
    folder: str | Path, skipped: Callable[[str], None] = lambda what: None
) -> list[Series]:
    """The MR series in ``folder`` and below it, sorted by description; headers are read, pixels are not.

    File names do not matter. Objects that are no MR image, localizers and files that are not DICOM are left out;
    ``skipped`` is called with one sentence for each kind. Raises `AnomriError` naming the folder and what it holds
    if there is no MR series, and the file if one is damaged.
    """
    folder, left_out = Path(folder), list[str]()
    groups: dict[tuple[str, str], dict[str, tuple[Path, Any]]] = {}
    strangers, copies = list[str](), 0
    for path in regular_files(folder):
        header = read_header(path)
        if header is None:
            strangers.append(path.name)
            continue
        series, kind, instance = (
            text_of(header, tag) for tag in ("SeriesInstanceUID", "SOPClassUID", "SOPInstanceUID")
        )
        members = groups.setdefault((series, kind), {})
        # A copy of a file in another folder is the same slice, not a second one.
        copies += instance in members
        members.setdefault(instance or str(path), (path, header))
    if copies:
        left_out.append(f"{copies} files that are copies of others (the same SOPInstanceUID)")
    if strangers:
        left_out.append(f"{len(strangers)} files that are not DICOM ({', '.join(strangers[:3])})")
    found = []
    for (_, kind), members in sorted(groups.items()):
        series_found = _series(list(members.values()))
        reason = _why_not(kind, series_found, next(iter(members.values()))[1])
        if reason:
            left_out.append(f"{series_found.description or series_found.files[0].name!r}: {reason}")
        else:
            found.append(series_found)
    for what in left_out:
        skipped(what)
    if not found:
        holds = "; ".join(left_out) or "no file at all"
        raise AnomriError(
            f"{folder}: no MR image series found. It holds: {holds}. Name a folder that holds MR series."
        )
    return sorted(found, key=lambda series: (series.description, series.uid))


def choose_series(
    folder: str | Path,
    channels: Mapping[str, str] | None = None,
    skipped: Callable[[str], None] = lambda what: None,
) -> dict[str, Series]:
    """The series of each channel: those that ``channels`` names by SeriesDescription or UID, else the guessed ones.

    Series without a guess are left out and told to ``skipped``. Raises `AnomriError` listing the series if two are
    the same channel, if none is known, or if they are not all of one study.
    """
    left_out: list[str] = []
    found = find_series(folder, left_out.append)
    chosen: dict[str, list[Series]] = {}
    if channels is None:
        for series in found:
            channel = guess_channel(series)
            if channel is None:
                left_out.append(f"{series}: its channel is not known")
            else:
                chosen.setdefault(channel, []).append(series)
    for channel, name in (channels or {}).items():
        if not re.fullmatch(r"[a-z0-9]+", channel) or channel in ANNOTATIONS:
            raise AnomriError(
                f"channel {channel!r}: name it in lower-case letters and digits, such as flair."
            )
        same = [s for s in found if name == s.uid or name.strip().lower() == s.description.lower()]
        chosen[channel] = same
    doubtful = [
        f"{channel} is {len(members)} series"
        for channel, members in chosen.items()
        if len(members) != 1
    ]
    if not chosen:
        doubtful = ["no series is known by its description to be flair, t1, t1ce or t2"]
    elif not doubtful and len({members[0].study for members in chosen.values()}) > 1:
        doubtful = ["the series belong to several studies; name a folder, or series, of one"]
    if doubtful:
        listing = "".join(
            f"\n  {series}: {guess_channel(series) or 'channel not known'}" for series in found
        )
        raise AnomriError(
            f"{folder}: {', '.join(doubtful)}. Say which series is which channel by its description or UID, as in "
            f"flair={found[0].description or found[0].uid!r}. MR series found:{listing}"
        )
    for what in left_out:
        skipped(what)
    return {channel: members[0] for channel, members in sorted(chosen.items())}


def convert(
    folder: str | Path,
    out: str | Path,
    channels: Mapping[str, str] | None = None,
    *,
    keep_identifiers: bool = False,
    skipped: Callable[[str], None] = lambda what: None,
) -> Case:
    """Write ``<case>_<channel>.nii.gz`` to ``out`` for the series that `choose_series` chooses.

    All series are read before the first file is written. The case is called ``case`` and twelve digits of the hash
    of its StudyInstanceUID; with ``keep_identifiers`` its PatientID stands before them and is the case's ``subject``.
    Series are not registered to each other. Raises `AnomriError` naming the folder or file that is not MR, damaged
    or incomplete, and ``pip install 'anomri[dicom]'`` if the libraries are missing.
    """
    return convert_series(
        choose_series(folder, channels, skipped), out, keep_identifiers=keep_identifiers
    )


def convert_series(
    chosen: Mapping[str, Series], out: str | Path, *, keep_identifiers: bool = False
) -> Case:
    """As `convert`, for series that are chosen already: channel -> series of one study."""
    first = next(iter(chosen.values()))
    name, subject = f"case{sha256(first.study.encode()).hexdigest()[:12]}", None
    if keep_identifiers:
        with quiet():
            subject = text_of(
                import_dicom("pydicom").dcmread(first.files[0], specific_tags=["PatientID"]),
                "PatientID",
            )
        # The hash stays: two visits of a patient are two cases, and one must not overwrite the other.
        name = f"{re.sub(r'[^A-Za-z0-9.-]+', '-', subject).strip('.-') or 'unnamed'}-{name[4:]}"
    images = {channel: read_series(series) for channel, series in chosen.items()}
    out = output_folder(Path(out))
    files = {channel: out / f"{name}_{channel}.nii.gz" for channel in chosen}
    for channel, image in images.items():
        data = np.asanyarray(image.dataobj)
        as_stored = np.array([[0, 1], [1, 1], [2, 1]])
        rows, columns, slices = data.shape
        written = image_of(
            data, Geometry((rows, columns, slices), image.affine, as_stored, image.header)
        )
        # One that is there already keeps its time, by which a run that goes on knows what it has done.
        if not _holds(files[channel], written):
            write_image_file(files[channel], written)
    frames = {series.frame for series in chosen.values() if series.frame}
    apart = (
        "its series are not of one frame of reference (the patient may have moved in between), and their channels may "
        "not lie on each other: register them, or look at one."
    )
    return Case(name, files, subject=subject or None, notes=(apart,) if len(frames) > 1 else ())


def _holds(path: Path, image: nib.Nifti1Image) -> bool:
    try:
        return read_image(path).to_bytes() == image.to_bytes()
    except AnomriError:
        return False


def read_series(series: Series) -> nib.Nifti1Image:
    """The image (column, row, slice) of a series in scanner mm (RAS+), decoded and rescaled by dicom2nifti.

    Integers stay as they are, values rescaled by the headers are float32. Raises `AnomriError` naming the file or
    the series' folder that cannot be decoded or does not fit.
    """
    library = import_dicom("dicom2nifti.convert_dicom")
    where = f"{series.files[0].parent}, series {series}"
    with quiet():
        slices = [read_whole(path) for path in series.files]
        ordered, affine = stack(series, slices)
        for number, one in enumerate(ordered, start=1):
            # dicom2nifti takes slices that were numbered in the order of acquisition for several volumes.
            one.InstanceNumber = number
            for keyword in ("EchoTime", "RepetitionTime"):
                # It reads them as numbers, and they may be empty; nothing here rests on them any more.
                if keyword in one:
                    delattr(one, keyword)
        try:
            # Not reoriented: `volume` does that, and the slices stay slices.
            image = library.dicom_array_to_nifti(ordered, None, reorient_nifti=False)["NII"]
        except (
            Exception
        ) as error:  # whatever a decoder or dicom2nifti raises; the first bad file is named
            for one in slices:
                check_pixels(one)
            raise AnomriError(
                f"{where}: dicom2nifti cannot convert it ({reason_of(error)})."
            ) from error
    data = np.asanyarray(image.dataobj)
    if data.shape != (ordered[0].Columns, ordered[0].Rows, len(ordered)):
        raise AnomriError(
            f"{where}: an image of {data.shape} came out of {len(ordered)} grey slices; convert by hand."
        )
    if not np.allclose(image.affine, affine, atol=1e-3):
        raise AnomriError(
            f"{where}: dicom2nifti places it elsewhere than its headers say; convert it by hand."
        )
    data = data.astype(np.float32) if data.dtype.kind == "f" else data
    clean = nib.Nifti1Image(data, affine)
    clean.header.set_xyzt_units("mm")
    clean.set_sform(affine, 1)
    clean.set_qform(affine, 1)
    return clean


def stack(series: Series, headers: Sequence[Any]) -> tuple[list[Any], NDArray[np.float64]]:
    """The slices sorted along the axis they are stacked on, and (column, row, slice) -> scanner mm (RAS+).

    The order is that of dicom2nifti: upwards along the axis on which they lie farthest apart. Raises `AnomriError`
    if orientation, pixel size or matrix differ, if a slice is missing or there twice, or is shifted sideways.
    """
    where = f"{series.files[0].parent}, series {series}"
    no_place = (
        "a file gives no usable position, orientation or pixel size; it is no slice of a scan"
    )
    try:
        planes = [
            (*one.ImageOrientationPatient, *one.PixelSpacing, one.Rows, one.Columns)
            for one in headers
        ]
        plane = np.array(planes, dtype=np.float64)
        position = np.array([one.ImagePositionPatient for one in headers], dtype=np.float64)
    except Exception as error:  # values are parsed when asked for, so anything can come out
        raise AnomriError(f"{where}: {no_place} ({reason_of(error)}).") from error
    if (
        plane.shape[1:] != (10,)
        or position.shape[1:] != (3,)
        or not np.isfinite(np.hstack([plane, position])).all()
    ):
        raise AnomriError(f"{where}: {no_place}.")
    odd = np.abs(plane - plane[0]).max(axis=1)
    if odd.max() > 1e-3:
        raise AnomriError(
            f"{where}: its slices differ in orientation, pixel size or matrix ({series.files[int(odd.argmax())].name} "
            f"and {series.files[0].name}); several scans are mixed in it. Hand in one of them in its own folder."
        )
    along, down = plane[0, :3], plane[0, 3:6]
    if (
        not np.allclose([along @ along, down @ down, along @ down], [1, 1, 0], atol=1e-2)
        or plane[0, 6:8].min() <= 0
    ):
        raise AnomriError(f"{where}: {no_place}.")
    order = np.argsort(position[:, np.abs(np.ptp(position, axis=0)).argmax()], kind="stable")
    position, files = position[order], [series.files[number] for number in order]
    _check_steps(where, position, np.cross(along, down), files)
    step = (position[-1] - position[0]) / (len(position) - 1)
    lps = np.eye(4)
    # PixelSpacing gives the distance between rows first, and a column index runs along a row.
    lps[:3] = np.stack([along * plane[0, 7], down * plane[0, 6], step, position[0]], axis=1)
    return [headers[number] for number in order], np.diag([-1.0, -1, 1, 1]) @ lps


def _series(members: Sequence[tuple[Path, Any]]) -> Series:
    header = members[0][1]
    return Series(
        uid=text_of(header, "SeriesInstanceUID"),
        study=text_of(header, "StudyInstanceUID"),
        description=text_of(header, "SeriesDescription"),
        protocol=text_of(header, "ProtocolName"),
        frame=text_of(header, "FrameOfReferenceUID"),
        modality=text_of(header, "Modality"),
        files=tuple(sorted(path for path, _ in members)),
        agent=text_of(header, "ContrastBolusAgent") if "ContrastBolusAgent" in header else None,
        echo_time=number_of(header, "EchoTime"),
        inversion_time=number_of(header, "InversionTime"),
        gradient_echo="GR" in text_of(header, "ScanningSequence").split(),
    )


def _why_not(kind: str, series: Series, header: Any) -> str | None:
    """Why a series is left out: what kind of object it holds, or that it is a localizer."""
    if kind in REASONS:
        return REASONS[kind]
    if kind != MR_IMAGE or series.modality != "MR":
        name = import_dicom("pydicom").uid.UID(kind).name
        return f"{series.slices} files of {name} (modality {series.modality or 'not given'}), no MR images"
    if not series.uid or not series.study:
        return f"{series.slices} files without SeriesInstanceUID or StudyInstanceUID"
    if series.slices < MIN_SLICES or "LOCALIZER" in text_of(header, "ImageType").split():
        return f"{series.slices} slices, a localizer or less than the {MIN_SLICES} slices that a scan has"
    return None


def _check_steps(
    where: str, position: NDArray[np.float64], normal: NDArray[np.float64], files: Sequence[Path]
) -> None:
    """See that slices sorted by ``position`` (n, 3) in mm follow each other at one distance along ``normal``."""
    steps = np.diff(position, axis=0)
    distance = np.abs(steps @ normal)
    usual = float(np.median(distance))
    if (distance < 1e-3).any():
        number = int(distance.argmin())
        raise AnomriError(
            f"{where}: {files[number].name} and {files[number + 1].name} lie at one position; it holds several volumes "
            f"(echoes, time points, magnitude and phase). Hand in one volume in its own folder."
        )
    wide = int(np.abs(distance - usual).argmax())
    if abs(distance[wide] - usual) > STEP_TOLERANCE * usual:
        raise AnomriError(
            f"{where}: {distance[wide]:.2f} mm lie between {files[wide].name} and {files[wide + 1].name}, elsewhere "
            f"{usual:.2f} mm; about {max(round(distance[wide] / usual) - 1, 1)} slices are missing. Copy the series again."
        )
    sideways = np.linalg.norm(steps - np.outer(steps @ normal, normal), axis=1)
    if sideways.max() > STEP_TOLERANCE * usual:
        raise AnomriError(
            f"{where}: its slices are shifted sideways by {sideways.max():.2f} mm each; resample it."
        )
