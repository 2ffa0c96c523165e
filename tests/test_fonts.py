"""Class names in any script are legible in figures, or numbers stand for them."""

import warnings
from collections.abc import Generator
from pathlib import Path

import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

import predict
import utils

NAMES = ["怒り", "悲しみ", "中立 $x$"]
ARABIC = ["غاضب", "سعيد"]


@pytest.fixture(autouse=True)
def fonts(monkeypatch: pytest.MonkeyPatch) -> Generator[list, None, None]:
    """Let only the fonts be installed that Matplotlib brings along."""
    own = [f for f in font_manager.fontManager.ttflist if "mpl-data" in f.fname]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", own)
    utils.find_fonts.cache_clear()
    yield own
    utils.find_fonts.cache_clear()


def install_font(folder: Path, name: str, letters: str) -> None:
    """Make a font whose letters are all blank, and let Matplotlib know it."""
    glyphs = {ord(letter): f"uni{ord(letter):04X}" for letter in letters}
    names = [".notdef", *glyphs.values()]
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder(names)
    font.setupCharacterMap(glyphs)
    font.setupGlyf(dict.fromkeys(names, TTGlyphPen(None).glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (900, 50)))
    font.setupHorizontalHeader(ascent=900, descent=-100)
    font.setupNameTable({"familyName": name, "styleName": "Regular"})
    font.setupPost()
    font.save(folder / f"{name}.ttf")
    font_manager.fontManager.addfont(folder / f"{name}.ttf")


def draw(names: list[str], path: Path) -> list[str]:
    """Draw names as figures do, no glyph missing; return those that were drawn."""
    figure = Figure()
    with utils.naming_classes(names) as shown, warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.subplots().barh(shown, range(len(shown)))
        figure.savefig(path)
    return shown


def test_fonts_that_are_installed_are_used(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    install_font(tmp_path, "Kanji", "怒悲中立")
    install_font(tmp_path, "Kana", "りしみ")
    assert draw(NAMES, tmp_path / "names.png") == NAMES
    assert utils.find_fonts("".join(NAMES)) == ["DejaVu Sans", "Kanji", "Kana"]
    assert capsys.readouterr().err == ""


def test_numbers_replace_names_that_no_font_has(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    install_font(tmp_path, "Kanji", "怒悲中立")
    for _ in range(2):  # the warning comes once
        assert draw(NAMES, tmp_path / "names.png") == ["1", "2", "3"]
    line = "no installed font has しみり; in figures the classes have numbers\n"
    assert capsys.readouterr().err == line


def test_usual_names_need_only_the_default_font(tmp_path: Path) -> None:
    for names in (["angry", "fröhlich"], ["сердитый", "θυμός"], ARABIC):
        assert draw(names, tmp_path / "names.png") == names
        assert utils.find_fonts("".join(names)) == ["DejaVu Sans"]


@pytest.mark.parametrize(
    ("emotion", "expected"), [("happy", "1 Happy (90.0 %)"), ("怒り", "1")]
)
def test_a_label_has_letters_of_one_font_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, emotion: str, expected: str
) -> None:
    install_font(tmp_path, "Kanji", "怒悲中立")
    install_font(tmp_path, "Kana", "りしみ")
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda *a: drawn.append(a[2]))
    record = dict.fromkeys(predict.BOX, 50) | {"status": "ok", "face": 1}
    record |= {"emotion": emotion, "confidence": 0.9}
    image = Image.new("RGB", (200, 200))
    predict.draw_faces(image, [record], {emotion: "#66c2a5"})
    assert drawn == [expected]
