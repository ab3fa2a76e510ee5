import re
from pathlib import Path

import pytest

from anomri.reporting import Page, Picture, Table, report, write_page
from anomri.spec import AnomriError


def test_pages_escape_what_comes_from_files_and_need_no_network(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    page = Page(
        title=evil,
        lead=evil,
        note=evil,
        pictures=[Picture(evil, "AAAA", evil, (evil,))],
        tables=[Table(evil, (evil, "n"), [(evil, 1)])],
        footer=evil,
    )
    text = write_page(tmp_path / "report.html", page).read_text()
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "default-src 'none'" in text
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", text)


def test_columns_of_numbers_are_known() -> None:
    table = Table("t", ("name", "n", "mixed"), [("a", "1.5", "2"), ("b", "", "x")])
    assert table.numeric == {1}


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(AnomriError, match="nothing to report"):
        report(tmp_path)
