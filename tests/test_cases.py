import json
from pathlib import Path

import pytest

from anomri.errors import AnomriError
from anomri.scans.case import Case, case_from_files, common_channels
from anomri.scans.find import find_cases, read_cohort
from anomri.scans.splits import (
    assign_splits,
    read_splits,
    split_cases,
    splits_by_name,
    write_splits,
)


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def test_a_folder_for_each_case_is_read(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "B/B_t1.nii.gz",
        "A_1/A_1_FLAIR.nii.gz",
        "A_1/A_1_t1.nii",
        "A_1/A_1_seg.nii.gz",
        "A_1/A_1_mask.nii.gz",
    )
    touch(tmp_path, ".cache/x_t1.nii.gz", "A_1/.A_1_t2.nii.gz", "A_1/notes.txt")
    first, second = find_cases(tmp_path)
    assert (first.name, list(first.channels), second.name) == ("A_1", ["flair", "t1"], "B")
    assert first.label == tmp_path / "A_1/A_1_seg.nii.gz"
    assert first.mask == tmp_path / "A_1/A_1_mask.nii.gz"


def test_a_flat_folder_a_single_case_and_a_single_file_are_read(tmp_path: Path) -> None:
    touch(tmp_path, "a_flair.nii.gz", "a_t1.nii.gz", "b_flair.nii.gz")
    assert [(case.name, len(case.channels)) for case in find_cases(tmp_path)] == [
        ("a", 2),
        ("b", 1),
    ]
    one = touch(tmp_path / "subject", "FLAIR.nii.gz", "T1.nii.gz")
    (case,) = find_cases(one)
    assert (case.name, sorted(case.channels)) == ("subject", ["flair", "t1"])
    (case,) = find_cases(tmp_path / "a_t1.nii.gz")
    assert case == Case("a", {"t1": tmp_path / "a_t1.nii.gz"})


def test_a_table_of_cases_is_read(tmp_path: Path) -> None:
    touch(tmp_path, "x.nii.gz", "y.nii.gz", "l.nii.gz")
    table = tmp_path / "cohort.tsv"
    table.write_text(
        "case\tFLAIR\tlesion\tbrain_mask\tsplit\tsubject\np1\tx.nii.gz\tl.nii.gz\t\ttest\ts\np2\ty.nii.gz\t\t\t\t\n"
    )
    first, second = find_cases(table)
    assert first == Case(
        "p1", {"flair": tmp_path / "x.nii.gz"}, tmp_path / "l.nii.gz", None, "test", "s"
    )
    assert (second.label, second.split, second.patient) == (None, None, "p2")


def test_splits_are_read_and_written(tmp_path: Path) -> None:
    touch(tmp_path, "a_t1.nii.gz", "b_t1.nii.gz")
    (tmp_path / "splits.csv").write_text("case,split\na,train\nb,val\n")
    cases = find_cases(tmp_path)
    assert [case.split for case in cases] == ["train", "val"]
    write_splits(tmp_path / "again.csv", cases)
    assert read_splits(tmp_path / "again.csv") == {"a": "train", "b": "val"}
    assert [case.split for case in assign_splits(cases, {"a": "test"})] == ["test", "val"]


def test_the_common_channels_are_those_of_most_cases() -> None:
    def case(*names: str) -> Case:
        return Case("c", dict.fromkeys(names, Path("x")))

    assert common_channels([case("t2", "flair"), case("t1"), case("flair", "t2")]) == (
        "flair",
        "t2",
    )
    with pytest.raises(AnomriError, match="no case"):
        common_channels([])


def test_a_missing_channel_is_named_with_what_was_found(tmp_path: Path) -> None:
    (case,) = find_cases(touch(tmp_path, "p_flair.nii.gz", "p_swi.nii.gz"))
    with pytest.raises(
        AnomriError, match=r"p: no file for channel t1ce in .*channels found: flair, swi"
    ):
        case.files(("flair", "t1ce"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name\tflair\na\tx.nii.gz\n", "no column case .*name, flair"),
        ("case\tflair\na\tgone.nii.gz\n", r"line 2, column flair: no such file: .*gone.nii.gz"),
        ("case\tflair\n\tx.nii.gz\n", "line 2: case '' is empty"),
        ("case\tflair\na\tx.nii.gz\na\tx.nii.gz\n", "line 3: case 'a' is empty, named twice"),
        ("case\tflair\n../a\tx.nii.gz\n", "holds a '/'"),
        (
            "case\tflair\tsplit\na\tx.nii.gz\ttraining\n",
            "split 'training' is not one of train, val, test",
        ),
        ("case\tflair\n", "no scans found"),
    ],
)
def test_bad_tables_name_file_and_line(tmp_path: Path, content: str, message: str) -> None:
    touch(tmp_path, "x.nii.gz")
    (tmp_path / "cohort.tsv").write_text(content)
    with pytest.raises(AnomriError, match=message):
        find_cases(tmp_path / "cohort.tsv")


def test_a_missing_empty_or_unreadable_cohort_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="no such file"):
        find_cases(tmp_path / "gone")
    with pytest.raises(AnomriError, match="no scans found"):
        find_cases(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AnomriError, match="not a folder"):
        find_cases(tmp_path / "notes.txt")
    touch(tmp_path, "a_t1.nii.gz", "a_t1.nii")
    with pytest.raises(AnomriError, match=r"both t1 of case a"):
        find_cases(tmp_path)
    (tmp_path / "bytes.tsv").write_bytes(b"\xff\xfe\x00case")
    with pytest.raises(AnomriError, match="cannot read the table"):
        find_cases(tmp_path / "bytes.tsv")


def test_what_detect_wrote_beside_the_scans_is_not_read_as_input(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "p_flair.nii.gz",
        "p_t1.nii.gz",
        "p_anomaly.nii.gz",
        "p_mask.nii.gz",
        "p_reconstruction.nii.gz",
    )
    touch(tmp_path / "out", "p_anomaly.nii.gz", "q_anomaly.nii.gz", "q_mask.nii.gz")
    (tmp_path / "out" / "p_anomaly.nii.gz").unlink()
    (case,) = find_cases(tmp_path)
    assert (case.name, list(case.channels), case.mask) == ("p", ["flair", "t1"], None)


def test_splits_that_name_other_cases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        AnomriError, match="the splits name x, y, ... but no case of the cohort, which has a, b"
    ):
        split_cases(_cases("a", "b"), {"x": "train", "y": "test"}, seed=0)
    assert [
        case.split for case in assign_splits(_cases("a", "b"), {"a": "train", "y": "test"})
    ] == ["train", None]


def _cases(*names: str) -> list[Case]:
    return [Case(name, {}) for name in names]


def test_random_split_keeps_patients_whole() -> None:
    cases = _cases(*[f"sub-{k:02d}_ses-{s}" for k in range(20) for s in "ab"])
    split = split_cases(cases, {}, seed=0)
    held_out = {case.patient for case in split if case.split == "val"}
    assert len(held_out) == 2
    assert not held_out & {case.patient for case in split if case.split == "train"}
    assert [case.split for case in split] == [case.split for case in split_cases(cases, {}, seed=0)]
    assert [case.split for case in split] != [case.split for case in split_cases(cases, {}, seed=1)]


def test_given_splits_are_honoured_and_checked() -> None:
    cases = split_cases(_cases("a", "b", "c", "d"), {"a": "train", "b": "val", "c": "test"}, seed=0)
    assert [case.split for case in cases] == ["train", "val", "test", None]
    with pytest.raises(AnomriError, match="patient sub-1 is in the splits train and val"):
        split_cases(
            _cases("sub-1_ses-1", "sub-1_ses-2"),
            {"sub-1_ses-1": "train", "sub-1_ses-2": "val"},
            seed=0,
        )
    with pytest.raises(AnomriError, match="no case is left to train on"):
        split_cases(_cases("a"), {}, seed=0)


def test_common_names_of_channels_are_known(tmp_path: Path) -> None:
    stem = "BraTS-GLI-00002-000"
    names = [f"{stem}/{stem}-{kind}.nii.gz" for kind in ("t1n", "t1c", "t2w", "t2f", "seg")]
    (case,) = find_cases(touch(tmp_path / "2023", *names))
    assert case.name == stem and list(case.channels) == ["flair", "t1", "t1ce", "t2"]
    assert case.label is not None and case.channels["t1ce"].name == f"{stem}-t1c.nii.gz"
    (case,) = find_cases(touch(tmp_path / "flat", "a-b_T1w.nii.gz", "a-b_FLAIR.nii.gz"))
    assert case.name == "a-b" and list(case.channels) == ["flair", "t1"]
    with pytest.raises(AnomriError, match="are both t1 of case x"):
        find_cases(touch(tmp_path / "twice", "x_t1.nii.gz", "x_T1w.nii.gz"))
    file = tmp_path / "flat" / "a-b_T1w.nii.gz"
    with pytest.raises(AnomriError, match="two of the channels t1, T1w are the same"):
        case_from_files({"t1": file, "T1w": file})


def test_outputs_of_detect_are_not_read_as_scans(tmp_path: Path) -> None:
    outputs = [f"x_{kind}.nii.gz" for kind in ("anomaly", "mask", "reconstruction")]
    touch(tmp_path, "x_flair.nii.gz", *outputs, *(f"again/{name}" for name in outputs))
    (case,) = find_cases(tmp_path)
    assert list(case.channels) == ["flair"] and case.mask is None


def test_a_contrast_agent_makes_t1ce_and_a_channel_named_twice_is_refused(tmp_path: Path) -> None:
    (case,) = find_cases(touch(tmp_path, "sub-1_T1w.nii.gz", "sub-1_ce-gd_T1w.nii.gz"))
    assert {name: path.name for name, path in case.channels.items()} == {
        "t1": "sub-1_T1w.nii.gz",
        "t1ce": "sub-1_ce-gd_T1w.nii.gz",
    }
    (tmp_path / "x.tsv").write_text("case\tt1\tT1w\na\tsub-1_T1w.nii.gz\tsub-1_T1w.nii.gz\n")
    with pytest.raises(
        AnomriError, match="line 2: two of the columns t1, T1w are the same channel"
    ):
        find_cases(tmp_path / "x.tsv")


def test_output_names_of_skull_stripping_tools_are_known(tmp_path: Path) -> None:
    names = ("p_FLAIR.nii.gz", "p_FLAIR_brain.nii.gz", "p_T1w_brain.nii.gz", "p_FLAIR_mask.nii.gz")
    (case,) = find_cases(touch(tmp_path, *names))
    assert case.name == "p" and case.mask == tmp_path / "p_FLAIR_mask.nii.gz"
    assert {name: path.name for name, path in case.channels.items()} == {
        "flair": names[1],
        "t1": names[2],
    }
    (alone,) = find_cases(tmp_path / names[1])
    assert (alone.name, list(alone.channels)) == ("p", ["flair"])
    outputs = touch(
        tmp_path / "again", "x_flair.nii.gz", "x_flair_anomaly.nii.gz", "x_flair_mask.nii.gz"
    )
    (case,) = find_cases(outputs)  # detected, in a case that is called x_flair
    assert case.mask is None and list(case.channels) == ["flair"]


@pytest.mark.parametrize(
    "names",
    [
        ("p_flair_brain.nii.gz", "p_flair_brain_mask.nii.gz"),
        ("p_flair.nii.gz", "p_brain_mask.nii.gz"),
        ("p_flair_bet.nii.gz", "p_flair_bet_mask.nii.gz"),
        ("p_flair.nii.gz", "p_desc-brain_mask.nii.gz"),
        ("p_swi.nii.gz", "p_flair.nii.gz", "p_swi_mask.nii.gz"),
    ],
)
def test_a_mask_belongs_to_the_case_whose_image_has_its_name(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    (case,) = find_cases(touch(tmp_path, *names))
    assert (case.name, case.mask) == ("p", tmp_path / names[-1]) and "flair" in case.channels


def test_folders_of_one_patient_become_one_case(tmp_path: Path) -> None:
    names = (
        "anat/sub-01_T1w.nii",
        "anat/sub-01_FLAIR.nii",
        "fmap/sub-01_phasediff.nii",
        "fmap/sub-01_FLAIR.json",
    )
    (case,) = find_cases(touch(tmp_path / "sub-01", *names))
    assert case.name == "sub-01" and {"t1", "flair"} < {*case.channels}
    (case,) = find_cases(touch(tmp_path / "q", "p_flair.nii", "a/p_swi.nii", "b/p_t2.nii"))
    assert case.name == "p" and list(case.channels) == ["flair", "swi", "t2"]


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("x_brain_flair.nii", "x_brain_t1.nii", "x_brain_mask.nii"), "x_brain_mask.nii"),
        (("p_flair.nii", "p_mask.nii", "p_brain_mask.nii"), "p_mask.nii"),
        (("p_flair.nii", "p_swi.nii", "p_flair_mask.nii", "p_swi_mask.nii"), "p_flair_mask.nii"),
        (
            ("p_T1_brain.nii", "p_T2_brain.nii", "p_T1_brain_mask.nii", "p_T2_brain_mask.nii"),
            "p_T1_brain_mask.nii",
        ),
        (("p_t1.nii", "p_flair.nii", "p_brain_mask.nii", "p_t1_mask.nii"), "p_brain_mask.nii"),
        (("p_t1.nii", "p_flair.nii", "p_t1_reg.nii", "p_t1_mask.nii"), "p_t1_mask.nii"),
        (("p_t1.nii", "p_seg.nii", "p_seg_mask.nii"), None),
    ],
)
def test_the_plainest_of_several_masks_is_taken(
    tmp_path: Path, names: tuple[str, ...], mask: str | None
) -> None:
    (case, *_) = find_cases(touch(tmp_path, *names))
    assert (case.mask and case.mask.name) == mask


def test_time_points_named_t1_and_t2_are_not_channels(tmp_path: Path) -> None:
    kinds = ("flair", "t1", "seg")
    first, second = find_cases(
        touch(tmp_path / "a", *(f"P_{time}_{kind}.nii" for time in ("T1", "T2") for kind in kinds))
    )
    assert [(case.name, list(case.channels)) for case in (first, second)] == [
        ("P_T1", ["flair", "t1"]),
        ("P_T2", ["flair", "t1"]),
    ]
    assert first.label and second.label
    alone = find_cases(
        touch(
            tmp_path / "b",
            *(f"P_{time}_flair{end}.nii" for time in ("T1", "T2") for end in ("", "_mask")),
        )
    )
    assert [(case.name, case.mask and case.mask.name) for case in alone] == [
        ("P_T1", "P_T1_flair_mask.nii"),
        ("P_T2", "P_T2_flair_mask.nii"),
    ]
    names = [f"P_{time}/P_{time}_{kind}.nii" for time in ("T1", "T2") for kind in ("flair", "seg")]
    for folder, files in (("c", names), ("d", ["images/P_T2_flair.nii", "labels/P_T2_seg.nii"])):
        cases = find_cases(touch(tmp_path / folder, *files))
        assert [case.name for case in cases if case.label and case.channels] == ["P_T1", "P_T2"][
            -len(cases) :
        ]
    (case,) = find_cases(touch(tmp_path / "e", "P_T2.nii", "P_T2_FLAIR.nii", "P_T2_mask.nii"))
    assert list(case.channels) == ["flair", "t2"] and case.mask


def test_a_channel_name_may_have_two_words(tmp_path: Path) -> None:
    names = ("T1_brain.nii.gz", "T2_FLAIR_brain.nii.gz", "t1_ce.nii.gz")
    (case,) = find_cases(touch(tmp_path, *(f"s1/{name}" for name in names)))
    assert case.name == "s1" and list(case.channels) == ["flair", "t1", "t1ce"]
    (case,) = find_cases(
        touch(tmp_path / "flat", "a_T2-FLAIR.nii.gz", "a_T1+C.nii.gz", "a_T2.nii.gz")
    )
    assert case.name == "a" and list(case.channels) == ["flair", "t1ce", "t2"]


def test_a_linked_folder_keeps_the_name_of_the_link(tmp_path: Path) -> None:
    touch(tmp_path / "store", "1/anat/FLAIR.nii.gz", "2/anat/T1.nii.gz", "KEY.nii.gz")
    cohort = tmp_path / "cohort"
    cohort.mkdir()
    for name, place in {"p1": "1/anat", "p2": "2/anat"}.items():
        (cohort / name).symlink_to(tmp_path / "store" / place)
    assert [(case.name, list(case.channels)) for case in find_cases(cohort)] == [
        ("p1", ["flair"]),
        ("p2", ["t1"]),
    ]
    (annexed := tmp_path / "p3" / "FLAIR.nii.gz").parent.mkdir()
    annexed.symlink_to(tmp_path / "store" / "KEY.nii.gz")
    assert [case_from_files({"flair": annexed}).name, find_cases(annexed)[0].name] == ["p3", "p3"]


def test_patients_with_equal_file_names_stay_apart(tmp_path: Path) -> None:
    touch(
        tmp_path / "mixed",
        "p1/scan_flair.nii.gz",
        "p2/scan_t1.nii.gz",
        "p2/scan_seg.nii.gz",
        "p3/scan_t1.nii.gz",
    )
    first, second, third = find_cases(tmp_path / "mixed")
    assert [(case.name, list(case.channels)) for case in (first, second)] == [
        ("p1", ["flair"]),
        ("p2", ["t1"]),
    ]
    assert first.label is None and second.label is not None and third.name == "p3"
    assert [
        case.name for case in find_cases(touch(tmp_path / "alike", "a/x_t1.nii", "b/x_t1.nii"))
    ] == ["a", "b"]
    with pytest.raises(AnomriError, match="both t1 of case p1; keep one of them"):
        find_cases(
            touch(
                tmp_path / "steps",
                "raw/p1_t1.nii",
                "raw/p1_t2.nii",
                "done/p1_t1.nii",
                "done/p1_t2.nii",
            )
        )
    with pytest.raises(
        AnomriError, match="both t1 of case v1; keep one of them or, if they are of two scans"
    ):
        find_cases(
            touch(tmp_path / "visits", *(f"{p}/{v}_t1.nii" for p in "ab" for v in ("v1", "v2")))
        )


@pytest.mark.parametrize(
    "names",
    [
        ("flair/p_flair.nii", "t1/p_t1.nii", "masks/p_mask.nii"),
        ("p_flair.nii", "p_t1.nii", "brains/p_mask.nii"),
        ("images/p_flair.nii", "images/p_t1.nii", "labels/p_mask.nii"),
        ("one/p_flair.nii", "one/q_flair.nii", "two/p_t1.nii", "two/q_t1.nii", "two/p_mask.nii"),
        ("imgs/p_flair.nii", "imgs/p_mask.nii", "more/p_t1.nii"),
        (
            "raw/p_flair.nii",
            "raw/p_t1.nii",
            "bet/p_flair_brain.nii",
            "bet/p_t1_brain.nii",
            "bet/p_mask.nii",
        ),
    ],
)
def test_folders_for_each_channel_and_mask_are_joined(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    case = find_cases(touch(tmp_path, *names))[0]
    assert (case.name, list(case.channels)) == ("p", ["flair", "t1"]) and case.mask is not None


def test_visits_in_brats_names_belong_to_one_patient(tmp_path: Path) -> None:
    cases = _cases(*(f"BraTS-GLI-{k:05d}-{visit:03d}" for k in range(10) for visit in range(3)))
    assert {case.patient for case in cases} == {f"BraTS-GLI-{k:05d}" for k in range(10)}
    held_out = [case.name[:15] for case in split_cases(cases, {}, seed=0) if case.split == "val"]
    assert len(held_out) == 3 and len({*held_out}) == 1


def test_visit_folders_in_patient_folders_are_read(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(
            f"p{n}/v{visit}/{name}.nii.gz"
            for n, visit in ((1, 1), (1, 2), (2, 1))
            for name in ("FLAIR", "seg")
        ),
    )
    touch(
        tmp_path,
        "p3/p3_v1/p3_v1_flair.nii.gz",
        "p4/2019/scan_flair.nii.gz",
        ".cache/v1/FLAIR.nii.gz",
    )
    (tmp_path / "splits.csv").write_text("case,split\np1_v1,train\np1_v2,train\np2_v1,val\n")
    cases = find_cases(tmp_path)
    assert [case.name for case in cases] == ["p1_v1", "p1_v2", "p2_v1", "p3_v1", "p4_2019"]
    assert [case.patient for case in cases] == ["p1", "p1", "p2", "p3", "p4"]
    assert cases[1] == Case(
        "p1_v2",
        {"flair": tmp_path / "p1/v2/FLAIR.nii.gz"},
        tmp_path / "p1/v2/seg.nii.gz",
        None,
        "train",
        "p1",
    )


@pytest.mark.parametrize("name", ["p1_v1_seg", "p1_seg", "v1_seg", "seg", "scan_seg"])
@pytest.mark.parametrize("image", ["p1_v1_flair", "p1_flair", "FLAIR", "scan_flair"])
def test_files_of_a_visit_are_one_case_whatever_their_names(
    tmp_path: Path, name: str, image: str
) -> None:
    touch(
        tmp_path,
        *(f"p1/v{visit}/{one}.nii.gz" for visit in (1, 2) for one in (name, image, "brain_mask")),
    )
    cases = find_cases(tmp_path)
    assert [(case.name, case.patient, list(case.channels)) for case in cases] == [
        (f"p1_v{visit}", "p1", ["flair"]) for visit in (1, 2)
    ]
    assert all(case.label and case.mask for case in cases)


def test_patients_may_have_visits_or_none_and_labels_elsewhere(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "p1/FLAIR.nii.gz",
        "p1/v2/FLAIR.nii.gz",
        "p2/ses-a/FLAIR.nii.gz",
        "labels/p2_ses-a_seg.nii.gz",
    )
    cases = find_cases(tmp_path)
    assert [(case.name, case.patient) for case in cases] == [
        ("p1", "p1"),
        ("p1_v2", "p1"),
        ("p2_ses-a", "p2"),
    ]
    assert cases[2].label == tmp_path / "labels/p2_ses-a_seg.nii.gz"


@pytest.mark.parametrize(
    "names",
    [
        ("HGG/Brats18_1/Brats18_1_flair", "LGG/Brats18_2/Brats18_2_flair"),
        ("train/p1/FLAIR", "val/p2/FLAIR", "test/p3/FLAIR"),
        ("images/p0/FLAIR", "labels/p0/p0_seg"),
        ("p1/FLAIR/FLAIR", "p1/T1/T1"),
        ("sub-01/anat/sub-01_FLAIR", "derivatives/hand/sub-01_label-lesion_mask"),
    ],
)
def test_nested_folders_that_are_not_visits_are_refused(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    with pytest.raises(
        AnomriError, match=r"no scans found.*There is .*nii.gz: name a folder that is nearer"
    ):
        find_cases(tmp_path)


LAYOUTS = {
    "MSSEG 2016": (
        [
            f"P{k}/{name}"
            for k in (1, 2)
            for name in ("FLAIR_preprocessed", "DP_preprocessed", "T2_preprocessed")
        ]
        + [
            f"P{k}/{name}"
            for k in (1, 2)
            for name in ("GADO_preprocessed", "Consensus", "Brain_Mask")
        ],
        {f"P{k}": ("flair pd t1ce t2", "Consensus", "Brain_Mask") for k in (1, 2)},
    ),
    "open_ms_data": (
        [
            f"p{k}/p{k}_{name}"
            for k in (1, 2)
            for name in ("FLAIR", "T1W", "T1WKS", "T2W", "consensus_gt", "brainmask")
        ],
        {f"p{k}": ("flair t1 t1ce t2", f"p{k}_consensus_gt", f"p{k}_brainmask") for k in (1, 2)},
    ),
    "open_ms_data, called alike": (
        [f"p{k}/{name}" for k in (1, 2) for name in ("FLAIR", "T1W", "consensus_gt", "brainmask")],
        {f"p{k}": ("flair t1", "consensus_gt", "brainmask") for k in (1, 2)},
    ),
    "ISBI 2015": (
        [
            f"training01_01_{name}"
            for name in ("flair_pp", "mprage_pp", "pd_pp", "t2_pp", "mask1", "mask2")
        ],
        {"training01_01": ("flair pd t1 t2", "training01_01_mask1", None)},
    ),
    "WMH 2017, flat": (["0/FLAIR", "0/T1", "0/wmh"], {"0": ("flair t1", "wmh", None)}),
    "WMH 2017": (
        [
            f"{k}/{name}"
            for k in (0, 2)
            for name in ("pre/FLAIR", "pre/T1", "pre/3DT1", "orig/FLAIR", "orig/T1", "wmh")
        ]
        + ["0/orig/3DT1", "0/orig/3DT1_mask"],
        {f"{k}": ("flair t1", "wmh", None) for k in (0, 2)},
    ),
    "MSSEG 2016, as it is published": (
        [f"P1/Preprocessed_Data/{name}_preprocessed" for name in ("FLAIR", "T1", "GADO")]
        + [f"P1/Masks/{name}" for name in ("Consensus", "Brain_Mask", "ManualSegmentation_1")]
        + [f"P1/Raw_Data/3D{name}" for name in ("FLAIR", "T1")],
        {"P1": ("flair t1 t1ce", "Consensus", "Brain_Mask")},
    ),
    "ISBI 2015, as it is published": (
        [
            f"training01/preprocessed/training01_0{k}_{name}_pp"
            for k in (1, 2)
            for name in ("flair", "mprage")
        ]
        + [f"training01/masks/training01_0{k}_mask{rater}" for k in (1, 2) for rater in (1, 2)]
        + ["training01/orig/training01_01_flair"],
        {f"training01_0{k}": ("flair t1", f"training01_0{k}_mask1", None) for k in (1, 2)},
    ),
    "steps of visits": (
        ["P1/v1/raw/FLAIR", "P1/v1/preprocessed/FLAIR", "P1/v1/lesion_seg"],
        {"P1_v1": ("flair", "lesion_seg", None)},
    ),
    "MSLesSeg": (
        [
            f"P1_{time}/P1_{time}_{name}"
            for time in ("T1", "T2")
            for name in ("FLAIR", "T1", "T2", "lesion_MASK")
        ],
        {f"P1_{time}": ("flair t1 t2", f"P1_{time}_lesion_MASK", None) for time in ("T1", "T2")},
    ),
    "BraTS 2020, case 355": (
        [
            "BraTS20_355/BraTS20_355_flair",
            "BraTS20_355/BraTS20_355_t1",
            "BraTS20_355/W39_1998.09.19_Segm",
        ],
        {"BraTS20_355": ("flair t1", "W39_1998.09.19_Segm", None)},
    ),
    "BraTS-MEN-RT": (["a-1/a-1_t1c", "a-1/a-1_gtv"], {"a-1": ("t1ce", "a-1_gtv", None)}),
    "UPENN-GBM": (
        ["UPENN-GBM-1_11_FLAIR", "UPENN-GBM-1_11_T1GD", "UPENN-GBM-1_11_segm"],
        {"UPENN-GBM-1_11": ("flair t1ce", "UPENN-GBM-1_11_segm", None)},
    ),
    "IXI": (
        ["IXI002-Guys-0828-T1", "IXI002-Guys-0828-PD", "IXI002-Guys-0828-MRA", "IXI003-HH-1-T1"],
        {"IXI002-Guys-0828": ("mra pd t1", None, None), "IXI003-HH-1": ("t1", None, None)},
    ),
    "visits by the names of BIDS": (
        [
            "sub-1/ses-1/sub-1_ses-1_T1w",
            "sub-1/ses-1/sub-1_ses-1_space-orig_label-L_desc-T1lesion_mask",
        ],
        {"sub-1_ses-1": ("t1", "sub-1_ses-1_space-orig_label-L_desc-T1lesion_mask", None)},
    ),
    "ds004199": (["sub-1_FLAIR", "sub-1_FLAIR_roi"], {"sub-1": ("flair", "sub-1_FLAIR_roi", None)}),
    "named after an image": (
        ["p_FLAIR", "p_T1", "p_FLAIR_seg", "p_T1_seg"],
        {"p": ("flair t1", "p_FLAIR_seg", None)},
    ),
    "named after what it shows": (
        [
            "p_FLAIR",
            "p_lesion_seg",
            "q_FLAIR",
            "q_manual_seg",
            "r_FLAIR",
            "r_lesionmask",
            "s_FLAIR",
            "s_wmh_mask",
        ],
        {
            "p": ("flair", "p_lesion_seg", None),
            "q": ("flair", "q_manual_seg", None),
            "r": ("flair", "r_lesionmask", None),
            "s": ("flair", "s_wmh_mask", None),
        },
    ),
    "a brain's mask and a lesion's": (
        ["p_FLAIR", "p_mask", "p_lesion_mask", "tumor_FLAIR", "tumor_mask"],
        {"p": ("flair", "p_lesion_mask", "p_mask"), "tumor": ("flair", None, "tumor_mask")},
    ),
    "drawn on each image": (
        [f"1-{of}{name}" for of in ("", "LesionSeg-") for name in ("T1", "Flair", "T2")],
        {"1": ("flair t1 t2", "1-LesionSeg-Flair", None)},
    ),
    "UCSF-PDGM": (
        [
            "U4_nifti/U4_FLAIR",
            "U4_nifti/U4_brain_parenchyma_segmentation",
            "U4_nifti/U4_tumor_segmentation",
        ],
        {"U4": ("flair", "U4_tumor_segmentation", None)},
    ),
    "tissues beside a lesion": (
        [
            "p/p_FLAIR",
            "p/aparc_seg",
            "p/p_brain_seg",
            "p/p_lesion_seg",
            "q/q_T1",
            "q/q_T1_brain_seg",
            "q/q_aparc_seg",
        ],
        {"p": ("flair", "p_lesion_seg", None), "q": ("t1", None, None)},
    ),
    "a lesion of a tissue": (
        [
            *(
                "p/p_flair",
                "p/p_brain_tumor_mask",
                "q/q_flair",
                "q/q_wm_lesion",
                "q/q_wm_mask",
                "q/q_brain_mask",
            ),
            *(
                "brain_01/brain_01_flair",
                "brain_01/brain_01_lesion_mask",
                "r/r_flair",
                "r/r_eye_mask",
                "r/hippocampus_seg",
            ),
        ],
        {
            "p": ("flair", "p_brain_tumor_mask", None),
            "q": ("flair", "q_wm_lesion", "q_brain_mask"),
            "brain_01": ("flair", "brain_01_lesion_mask", None),
            "r": ("flair", None, None),
        },
    ),
    "masks of tissues, called alike": (
        [
            f"P{k}/{name}"
            for k in (1, 2)
            for name in ("FLAIR", "wm_mask", "csf_mask", "brain_mask", "lesion_mask")
        ],
        {f"P{k}": ("flair", "lesion_mask", "brain_mask") for k in (1, 2)},
    ),
    "a visit's own label before others": (
        ["P1/v1/FLAIR", "P1/v1/FLAIR_seg", "P1/v1/T1_seg", "P1/v1/final_seg"],
        {"P1_v1": ("flair", "FLAIR_seg", None)},
    ),
    "cases called after a lesion": (
        [
            "p_flair",
            "p_t1",
            "p_lesion_flair",
            "p_lesion_t1",
            "P_stroke_flair",
            "P_stroke_lesion_mask",
            "P_stroke_brain_mask",
        ],
        {
            "p": ("flair t1", None, None),
            "p_lesion": ("flair t1", None, None),
            "P_stroke": ("flair", "P_stroke_lesion_mask", "P_stroke_brain_mask"),
        },
    ),
    "named after what was done": (
        ["p_flair_pp", "p_flair_pp_mask", "p_flair_pp_seg"],
        {"p": ("flair", "p_flair_pp_seg", "p_flair_pp_mask")},
    ),
    "ISLES": (["p_flair", "p_dwi", "p_adc", "p_msk"], {"p": ("adc dwi flair", "p_msk", None)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_names_of_public_data_sets_are_known(tmp_path: Path, layout: str) -> None:
    names, expected = LAYOUTS[layout]
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    found = {
        case.name: (
            " ".join(case.channels),
            case.label and case.label.name.removesuffix(".nii.gz"),
            case.mask and case.mask.name.removesuffix(".nii.gz"),
        )
        for case in find_cases(tmp_path)
    }
    assert found == expected


def test_the_processing_step_that_fits_the_labels_is_taken_with_a_note(
    tmp_path: Path,
) -> None:
    touch(tmp_path, "0/pre/FLAIR.nii", "0/orig/FLAIR.nii", "0/raw/notes.txt", "0/wmh.nii")
    (case,), (alone,) = find_cases(tmp_path), find_cases(tmp_path / "0")
    assert case == alone
    assert (case.channels, case.label) == (
        {"flair": tmp_path / "0/pre/FLAIR.nii"},
        tmp_path / "0/wmh.nii",
    )
    assert case.notes == ("0: its images are those in pre; not read: orig/FLAIR.nii.",)
    # Results beside them are no step and no scan, nor is a folder without images.
    touch(
        tmp_path / "0",
        "out/0_anomaly.nii.gz",
        "0_anomaly.nii.gz",
        "0_mask.nii.gz",
        "atlas/labels2.nii",
        "pre0/x.txt",
    )
    again = find_cases(tmp_path / "0")
    assert [(one.name, one.channels, one.label, one.mask) for one in again] == [
        ("0", case.channels, case.label, None)
    ]


@pytest.mark.parametrize(
    ("names", "label", "unread"),
    [
        (
            ("labels/lesions_rater1.nii", "labels/FLAIR.nii"),
            None,
            "labels/FLAIR.nii, labels/lesions_rater1.nii",
        ),
        (
            ("lesions/mask.nii", "lesions/FLAIR_mask.nii"),
            None,
            "lesions/FLAIR_mask.nii, lesions/mask.nii",
        ),
        (("raw/gt.nii", "raw/FLAIR.nii"), None, "raw/FLAIR.nii, raw/gt.nii"),
        (
            ("lesions/FLAIR_seg.nii", "masks/manual_1.nii"),
            "lesions/FLAIR_seg.nii",
            "masks/manual_1.nii",
        ),
        (("wmh_v2.nii", "raw/brainmask.nii"), None, "wmh_v2.nii, raw/brainmask.nii"),
    ],
)
def test_files_left_out_beside_processing_steps_are_named(
    tmp_path: Path, names: tuple[str, ...], label: str | None, unread: str
) -> None:
    place = touch(tmp_path / "P1", "processed/FLAIR.nii", *names)
    for folder in (tmp_path, place):
        (case,) = find_cases(folder)
        assert (case.label, case.mask) == (label and place / label, None)
        assert case.notes == (f"P1: its images are those in processed; not read: {unread}.",)


def test_a_patient_folder_alone_is_read_as_in_its_cohort(tmp_path: Path) -> None:
    for place in ("orig", "preprocessed"):
        touch(
            tmp_path,
            *(f"t01/{place}/t01_0{k}_{name}.nii" for k in (1, 2) for name in ("flair", "mprage")),
        )
    touch(tmp_path, "t01/masks/t01_01_mask1.nii", "t01/masks/t01_02_mask1.nii")
    touch(
        tmp_path,
        "q/raw/q_FLAIR.nii",
        "q/preprocessed/q_FLAIR.nii",
        "q/preprocessed/consensus_gt.nii",
    )
    assert [one.name for one in find_cases(tmp_path)] == ["q", "t01_01", "t01_02"]
    assert find_cases(tmp_path) == find_cases(tmp_path / "q") + find_cases(tmp_path / "t01")
    assert {path.parent.name for one in find_cases(tmp_path) for path in one.channels.values()} == {
        "preprocessed"
    }


def test_a_case_does_not_mix_processing_steps(tmp_path: Path) -> None:
    touch(tmp_path, "raw/p1_FLAIR.nii", "raw/p2_FLAIR.nii", "raw/p1_seg.nii")
    touch(tmp_path, "preprocessed/p1_FLAIR_mni.nii", "preprocessed/p1_T1_mni.nii")
    first, second = find_cases(tmp_path)
    assert {path.parent.name for path in first.channels.values()} == {"preprocessed"}
    assert (sorted(first.channels), first.label) == (["flair", "t1"], None)
    assert first.notes == (
        "p1: its images are those in preprocessed; not read: raw, raw/p1_seg.nii.",
    )
    assert second == Case("p2", {"flair": tmp_path / "raw/p2_FLAIR.nii"})


def test_folders_of_processing_steps_are_not_taken_for_visits_cohorts_or_data_sets(
    tmp_path: Path,
) -> None:
    touch(tmp_path / "times", "p1/pre/FLAIR.nii", "p2/pre/FLAIR.nii", "p2/post/FLAIR.nii")
    with pytest.raises(
        AnomriError, match="p2: has images in pre and in post; call folders of times"
    ):
        find_cases(tmp_path / "times")
    # Cases that are called after their cohort are not one patient's.
    named = touch(
        tmp_path / "MS", *(f"raw/MS0{k}_flair.nii" for k in (1, 2)), "preprocessed/MS01_flair.nii"
    )
    touch(named, "groundtruth/MS01_seg.nii", "brainmasks/MS01_mask.nii")
    first, second = find_cases(named)
    assert (first.label, first.mask) == (
        named / "groundtruth/MS01_seg.nii",
        named / "brainmasks/MS01_mask.nii",
    )
    assert (first.channels["flair"].parent.name, second.name) == ("preprocessed", "MS02")
    # Nor is what lies in another's folder of steps.
    touch(tmp_path / "old", "p1/p1_FLAIR.nii", "archive/raw/p1_T1.nii")
    (case,) = find_cases(tmp_path / "old")
    assert [*case.channels] == ["flair"]
    alike = touch(tmp_path / "alike", "raw/anna_FLAIR.nii", "preprocessed/anna_FLAIR.nii")
    assert [(one.name, one.channels["flair"].parent.name) for one in find_cases(alike)] == [
        ("anna", "preprocessed")
    ]
    visited = touch(tmp_path / "visited", "raw/FLAIR.nii", "P1/v1/FLAIR.nii")
    assert [one.name for one in find_cases(visited)] == ["P1_v1", "raw"]


def test_a_patient_name_that_looks_like_a_tissue_tool_keeps_its_mask(tmp_path: Path) -> None:
    (case,) = find_cases(touch(tmp_path, "FAST_001_dwi.nii", "FAST_001_mask.nii"))
    assert case.mask == tmp_path / "FAST_001_mask.nii"


def test_one_of_several_labels_is_taken_with_a_note(tmp_path: Path) -> None:
    (case,) = find_cases(
        touch(
            tmp_path,
            "p_FLAIR.nii",
            "p_manual.nii",
            "p_consensus.nii",
            "p_mask.nii",
            "p_brainmask.nii",
        )
    )
    assert (case.label, case.mask) == (tmp_path / "p_consensus.nii", tmp_path / "p_brainmask.nii")
    assert case.notes == (
        "p: p_brainmask.nii is taken for its brain mask, not p_mask.nii.",
        "p: p_consensus.nii is taken for its label, not p_manual.nii.",
    )
    names = ("lesion_mask", "manual_seg", "wml_mask", "FLAIR_seg")
    (case,) = find_cases(
        touch(tmp_path / "more", "q_FLAIR.nii", *(f"q_{name}.nii" for name in names))
    )
    others = "q_FLAIR_seg.nii, q_lesion_mask.nii, q_wml_mask.nii"
    assert case.notes == (f"q: q_manual_seg.nii is taken for its label, not {others}.",)


@pytest.mark.parametrize(
    "names",
    [
        ("0/wmh", "0/images/FLAIR"),
        ("segm/UPENN-GBM-1_11_segm", "structural/UPENN-GBM-1_11/UPENN-GBM-1_11_FLAIR"),
        ("a/b/c/d/FLAIR",),
    ],
)
def test_a_folder_with_labels_only_is_refused_and_deeper_images_are_named(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    with pytest.raises(
        AnomriError,
        match=rf"no scans found.*There is .*{names[-1]}.nii.gz: name a folder that is nearer",
    ):
        find_cases(tmp_path)


def test_labels_without_images_are_cases_for_maps_of_other_programs(tmp_path: Path) -> None:
    touch(tmp_path, "p1/v1/seg.nii", "p2/v1/seg.nii")
    assert all(case.label and not case.channels for case in find_cases(tmp_path))


@pytest.mark.parametrize(
    ("name", "patient"),
    [
        ("P01_v2", "P01"),
        ("P1_T2", "P1"),
        ("site3_p7_baseline", "site3_p7"),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
        ("training01_02", "training01"),
        ("Brats18_TCIA02_606_1", "Brats18_TCIA02_606_1"),
        ("scan_2001", "scan_2001"),
        ("head_v1", "head_v1"),
        ("3T_V01", "3T_V01"),
        ("test1_001", "test1_001"),
    ],
)
def test_the_patient_is_read_from_the_scan_name(name: str, patient: str) -> None:
    assert Case(name, {}).patient == patient


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        (("p_t1", "p_t1_mni", "p_t1_n4"), "p_t1"),
        (("p_t1", "p_t1_n4", "p_t1_brain", "p_t1_brain_n4"), "p_t1_brain"),
        (("p_t1_n4", "p_t1_n4_reg"), "p_t1_n4"),
        (("p_t1", "p_mprage"), "p_t1"),
        (("p_t1", "p_mprage", "p_mprage_brain"), "p_t1"),
        (("p_mprage",), "p_mprage"),
    ],
)
def test_one_of_several_images_of_a_channel_is_preferred(
    tmp_path: Path, names: tuple[str, ...], taken: str
) -> None:
    (case,) = find_cases(touch(tmp_path, *(f"{name}.nii" for name in names)))
    assert case.channels == {"t1": tmp_path / f"{taken}.nii"}


def test_two_images_with_different_processing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="p_t1_n4.nii and .*p_t1_reg.nii are both t1 of case p"):
        find_cases(touch(tmp_path, "p_t1_n4.nii", "p_t1_reg.nii"))


def test_a_patient_with_one_training_scan_counts_as_trained_on() -> None:
    cases = [
        Case("P1_v1", {}, split="test"),
        Case("P1_v2", {}, split="train"),
        Case("P1_v3", {}, split="val"),
    ]
    for order in (cases, cases[::-1]):
        assert splits_by_name(order) == {
            "P1": "train",
            "P1_v1": "test",
            "P1_v2": "train",
            "P1_v3": "val",
        }


def test_a_raw_nnunet_data_set_is_read(tmp_path: Path) -> None:
    names = (
        "imagesTr/MS_001_0000",
        "imagesTr/MS_001_0001",
        "labelsTr/MS_001",
        "imagesTr/MS_002_0000",
        "imagesTr/MS_002_0001",
    )
    touch(tmp_path, *(f"{name}.nii.gz" for name in names))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T2-FLAIR", "1": "T1Gd"}}')
    first, second = find_cases(tmp_path)
    assert first == Case(
        "MS_001",
        {"flair": tmp_path / f"{names[0]}.nii.gz", "t1ce": tmp_path / f"{names[1]}.nii.gz"},
        tmp_path / "labelsTr/MS_001.nii.gz",
    )
    assert (second.label, second.split) == (None, None)
    touch(tmp_path, "imagesTs/MS_003_0000.nii.gz")
    assert [(case.name, case.split) for case in find_cases(tmp_path)][1:] == [
        ("MS_002", "train"),
        ("MS_003", "test"),
    ]
    touch(tmp_path, "labelsTr/MS_009.nii.gz")
    assert [(case.name, case.channels) for case in find_cases(tmp_path)][-1] == ("MS_009", {})
    with pytest.raises(
        AnomriError,
        match="MS_003_0002.nii.gz: does not end in one of 0000, 0001, as dataset.json has them",
    ):
        find_cases(touch(tmp_path, "imagesTs/MS_003_0002.nii.gz"))
    (tmp_path / "dataset.json").write_text('{"channel_names": {"0": "T1", "1": "T1w", "2": "T2"}}')
    with pytest.raises(AnomriError, match="MS_001_0001.nii.gz are both t1 of MS_001"):
        find_cases(tmp_path)
    (tmp_path / "dataset.json").write_text('{"channel_names": ["FLAIR"]}')
    with pytest.raises(AnomriError, match="has no channel_names as"):
        find_cases(tmp_path)


def describe_nnunet(folder: Path, channels: dict[str, str], **more: object) -> Path:
    files = [f"imagesTr/a_{int(number):04d}.nii.gz" for number in channels]
    touch(folder, *files, "labelsTr/a.nii.gz")
    facts = {"channel_names": channels, **more}
    (folder / "dataset.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("labels", "ignored"),
    [
        ({"background": 0, "lesion": 1, "ignore": 2}, (2,)),
        ({"0": "background", "1": "lesion", "2": "ignore"}, (2,)),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "ignore": 4}, (4,)),
        ({"background": 0, "lesion": 1, "Ignore": 255}, (255,)),
        ({"background": 0, "edema": 1, "tumour": 2}, ()),
        ({"0": "background", "1": "lesion"}, ()),
    ],
)
def test_ignored_nnunet_labels_are_known_and_kept_in_tables(
    tmp_path: Path, labels: dict[str, object], ignored: tuple[int, ...]
) -> None:
    (case,) = find_cases(describe_nnunet(tmp_path / "in", {"0": "FLAIR"}, labels=labels))
    assert case.ignored == ignored
    read_cohort(tmp_path / "in").write(tmp_path / "cohort.tsv")
    (same,) = find_cases(tmp_path / "cohort.tsv")
    assert same == case


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"background": 1, "lesion": 0}, "background has the value"),
        ({"background": 0, "lesion": "one"}, "label 'lesion' has no whole number"),
        (["background", "lesion"], "labels are not written as"),
    ],
)
def test_nnunet_labels_that_cannot_be_understood_are_refused(
    tmp_path: Path, labels: object, message: str
) -> None:
    with pytest.raises(AnomriError, match=rf"dataset.json: {message}"):
        find_cases(describe_nnunet(tmp_path, {"0": "FLAIR"}, labels=labels))


@pytest.mark.parametrize(
    ("name", "channel"),
    [
        *(("T1-weighted", "t1"), ("T1w", "t1"), ("T1 weighted image", "t1"), ("MPRAGE", "t1")),
        *(("T2-FLAIR", "flair"), ("T2w FLAIR", "flair"), ("FLAIR MRI", "flair")),
        *(("T1Gd", "t1ce"), ("ce-T1w", "t1ce"), ("T1-weighted (post-contrast)", "t1ce")),
        *(("T2-weighted", "t2"), ("T2*", "t2star"), ("PD-weighted", "pd"), ("CBF", "cbf")),
    ],
)
def test_nnunet_channels_get_the_names_of_dataset_json(
    tmp_path: Path, name: str, channel: str
) -> None:
    (case,) = find_cases(describe_nnunet(tmp_path, {"0": name}))
    assert list(case.channels) == [channel]


@pytest.mark.parametrize("name", ["noNorm", "zscore", "MRI", "CT", "T1 map of something", "T1rho"])
def test_a_dataset_json_name_that_is_not_a_channel_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(AnomriError, match=f"channel 1 is called '{name}', which is not a channel"):
        find_cases(describe_nnunet(tmp_path, {"0": "FLAIR", "1": name}))


def test_a_table_column_may_have_any_common_channel_name(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    table = tmp_path / "cohort.tsv"
    table.write_text("case\tT1-weighted\tT2-FLAIR\tignored_label\nx\ta.nii.gz\tb.nii.gz\t2, 3\n")
    (case,) = find_cases(table)
    assert (list(case.channels), case.ignored) == (["flair", "t1"], (2, 3))
    table.write_text("case\tt1\tignored_label\nx\ta.nii.gz\tother\n")
    with pytest.raises(AnomriError, match="column ignored_label: 'other' is not a list"):
        find_cases(table)
