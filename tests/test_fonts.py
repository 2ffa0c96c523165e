"""Class names in any script are legible in figures, or numbers stand for them.

The reference is Matplotlib, which warns of a letter that its font has not.
"""

import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
from matplotlib import font_manager
from matplotlib.figure import Figure

import utils


@pytest.fixture(autouse=True)
def fonts(monkeypatch: pytest.MonkeyPatch) -> Generator[None, None, None]:
    """Let only the fonts be installed that Matplotlib brings along."""
    own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    utils.find_fonts.cache_clear()
    yield
    utils.find_fonts.cache_clear()


def test_fonts_that_are_installed_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    # The default font, DejaVu Sans, has neither letter, and no font here has both.
    names, figure = ["の", "ᴕ", r"no $\formula$"], Figure()
    with utils.naming_classes(names) as shown, warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.subplots().barh(shown, range(3))
        figure.savefig(tmp_path / "names.png")
    assert shown == names
    assert capsys.readouterr().err == ""


def test_numbers_replace_names_that_no_font_has(capsys: pytest.CaptureFixture) -> None:
    for _ in range(2):  # the warning comes once
        with utils.naming_classes(["怒り", "sad"]) as shown:
            assert shown == ["1", "2"]
    line = "no installed font has り怒; in figures the classes have numbers\n"
    assert capsys.readouterr().err == line
