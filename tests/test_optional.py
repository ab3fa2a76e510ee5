"""The advice to install an extra works for the installation at hand."""

import json
from pathlib import Path

import pytest

from anomri import optional
from anomri.errors import AnomriError


def test_a_missing_library_is_reported_with_the_command_that_installs_it() -> None:
    with pytest.raises(AnomriError) as caught:
        optional.import_extra("anomri_no_such_library", "bet", "--skull-strip")
    assert str(caught.value) == (
        "--skull-strip needs a library that is not installed (No module named "
        f"'anomri_no_such_library'). Install it with: {optional.install_command('bet')}"
    )


def test_an_extra_is_installed_from_where_the_package_came_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "a checkout" / "src" / "anomri" / "optional.py"
    module.parent.mkdir(parents=True)
    monkeypatch.setattr(optional, "__file__", str(module))
    url: dict[str, str] = {}

    class Installed:
        def read_text(self, name: str) -> str | None:
            assert name == "direct_url.json"
            return json.dumps(url) if url else None

    monkeypatch.setattr(optional, "distribution", lambda name: Installed())
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"
    wheel = tmp_path / "anomri-1.0-py3-none-any.whl"
    url["url"] = wheel.as_uri()
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"  # it is gone
    wheel.touch()
    assert optional.install_command("bet") == f"pip install '{wheel}[bet]'"
    checkout = module.parents[2]
    url["url"] = checkout.as_uri()
    assert optional.install_command("bet") == f"pip install '{checkout}[bet]'"
    (checkout / "pyproject.toml").touch()
    assert optional.install_command("bet") == f"pip install -e '{checkout}[bet]'"
    url["url"] = "https://example.org/anomri.whl"
    (checkout / "pyproject.toml").unlink()
    assert optional.install_command("bet") == "pip install 'anomri[bet]'"
