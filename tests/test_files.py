from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from anomri.errors import AnomriError
from anomri.files import output_folder, whole_file, write_text


def test_many_writers_of_one_file_leave_one_whole_file(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda k: write_text(tmp_path / "f", f"{k}" * 10_000), range(64)))
    content = (tmp_path / "f").read_text()
    assert content in {f"{k}" * 10_000 for k in range(64)}
    assert [path.name for path in tmp_path.iterdir()] == ["f"]


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "f", "before")

    def fail() -> None:
        with whole_file(tmp_path / "f") as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    with pytest.raises(AnomriError, match="f: cannot write .No space left"):
        fail()
    assert (tmp_path / "f").read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_folder_is_made_or_refused(tmp_path: Path) -> None:
    assert output_folder(tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(AnomriError, match="cannot write to this folder"):
        output_folder(tmp_path / "file")
