"""What --image names, in lists, patterns and folders; none of it is written over.

The references are the names that the tests give, and what the files held before.
"""

import csv
import io
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import CROP, LINUX, MODEL, ROOT, UNIX, Ask

import predict


@UNIX
def test_lists_as_any_system_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a b.png", "\u9854.png", '"as it stands"', "'quoted'.png"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path(name).touch()
    lines = ["'a b.png'", '"\u9854.png" ', names[2], "", f'"{names[3]}"', '"none.png"']
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        content = "\r\n".join(lines).encode(encoding)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert list(predict.find_images(["-"])) == [*names, "none.png"], encoding
    assert predict.read_list(b"any-\xe9.png\n") == [os.fsdecode(b"any-\xe9.png")]


def test_patterns_that_the_shell_did_not_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("deep", "c.png")
    os.mkdir("deep")
    for name in ("b.png", "a1.png", deep, "a[1].png"):
        shutil.copy(CROP, name)
    assert list(predict.find_images(["*.png"])) == ["a1.png", "a[1].png", "b.png"]
    every = ["a1.png", "a[1].png", "b.png", deep]
    assert list(predict.find_images(["**"])) == every  # each file once
    assert list(predict.find_images(["a[1].png"])) == ["a[1].png"]  # a file's name


def test_names_without_a_file(ask: Ask) -> None:
    url = "https://example.org/a.jpg"
    first = f"predict.py: error: {url}: a URL; save the picture, and name its file"
    second = "predict.py: error: 0: no such file or folder; the camera is webcam:0"
    code, _, err = ask("--image", CROP, url, "0")
    assert (code, err) == (1, f"{first}\n{second}\n")


def test_other_files_of_a_folder_are_ignored(tmp_path: Path, ask: Ask) -> None:
    crop, notes = tmp_path / "crop.png", tmp_path / "notes.txt"
    shutil.copy(CROP, crop)
    shutil.copy(ROOT / "data" / "astronaut.mp4", tmp_path)
    notes.write_text("something else")
    code, out, err = ask("--image", tmp_path)
    assert (code, err) == (0, "predict.py: ignored, no pictures: 2\n")
    assert out.count("\n") == 1 and out.startswith(f"{crop}: ")
    line = "predict.py: error: {}: not a readable image or video\n"
    code, again, err = ask("--image", tmp_path, notes)
    assert (code, again) == (1, out)
    assert err == line.format(notes) + "predict.py: ignored, no pictures: 1\n"
    crop.unlink()
    assert ask("--image", tmp_path) == (1, "", "predict.py: ignored, no pictures: 2\n")


@LINUX
def test_strange_names_are_safe_to_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["two\nlines.png", "\x1b[2J.png", "any-\udce9.png", "=1.png"]
    shown = [r"two\nlines.png", r"\x1b[2J.png", r"any-\udce9.png", "=1.png"]
    for name in names:
        shutil.copy(CROP, name)
    missing = "no\ntwo\nlines.png"
    line = r"predict.py: error: no\ntwo\nlines.png: no such file or folder"
    assert ask("--image", missing) == (line, "", "")
    _, out, err = ask("--image", *names, missing)
    assert [text.rpartition(": ")[0] for text in out.split("\n")] == [*shown, ""]
    assert err == f"{line}\n"
    _, out, _ = ask("--image", *names, "--format", "csv")
    paths = [row["path"] for row in csv.DictReader(io.StringIO(out))]
    assert paths == [*shown[:3], "./=1.png"]  # no formula for a spreadsheet


def test_wrong_usage(ask: Ask) -> None:
    for words, reason in (
        ("--image a.jpg --\x1b[2J", r"unrecognized arguments: --\x1b[2J"),
        ("--image a.jpg --min-confidence 2", "--min-confidence: 2.0 is not in [0, 1]"),
        ("--image a.jpg --fps 0", "--fps: 0.0 is not above 0, up to 1000"),
        ("--evaluate b --faces never", "--faces makes no sense with --evaluate"),
    ):
        code, out, err = ask(*words.split())
        assert (code, out) == (2, "") and reason in err


@pytest.fixture
def album(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to a folder of photos whose names are those of what would be drawn."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("mia.png", "sub/MIA.jpg", "sub/mia-emotions.png", "mia-emotions.png"):
        shutil.copy(CROP, folder / name)
    monkeypatch.chdir(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files below a folder hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_drawn_files_are_replaced_and_not_read(album: Path, ask: Ask) -> None:
    photos, words = contents(album), ["--image", album, "--plot", album]
    words += ["--output", album / "result.csv", "--format", "csv"]
    assert ask(*words) == (0, "", "")
    written = contents(album)
    drawn = {"mia-emotions-2.png", "MIA-emotions.png", "mia-emotions-emotions.png"}
    drawn |= {"mia-emotions-emotions-2.png"}
    assert set(written) == {*photos, *drawn, "result.csv"}
    assert written == written | photos
    rows = (album / "result.csv").read_text().splitlines()[1:]
    names = [Path(row.split(",")[0]).name for row in rows]
    assert names == ["mia-emotions.png", "mia.png", "MIA.jpg", "mia-emotions.png"]
    assert ask(*words) == (0, "", "")
    assert ask("--image", "mia.png", "--plot", "mia-emotions-2.png")[0] == 0
    assert contents(album) == written
    line = "MIA-emotions.png: drawn by predict.py; name the photo itself"
    assert ask("--image", "MIA-emotions.png")[2] == f"predict.py: error: {line}\n"


@UNIX
def test_nothing_of_the_user_s_is_overwritten(album: Path, ask: Ask) -> None:
    Path("link.png").symlink_to("mia.png")
    os.link("mia.png", "hard.png")
    Path("damaged.png").write_bytes(CROP.read_bytes()[:99])
    shutil.copy(ROOT / MODEL, "model.png")
    before = contents(album)
    for words, line in (
        ("mia.png --output ./sub/../mia.png", "mia.png: is an input"),
        ("link.png --explain hard.png", "link.png: is an input"),
        ("sub --plot sub/MIA.jpg", "sub/MIA.jpg: is a picture"),
        ("mia.png --model model.png --plot model.png", "model.png: is an input"),
        ("sub/MIA.jpg --plot mia.png", "mia.png: is a picture"),
        ("mia.png --output damaged.png", "damaged.png: is a picture"),
        ("mia.png --output a.mp4", "a.mp4: is no name for text"),
        ("mia.png --plot a.png --explain a.png", "a.png: two options name"),
    ):
        code, out, err = ask("--image", *words.split())
        assert (code, out) == (2, "")
        assert err.startswith(f"predict.py: error: {line}")
    assert contents(album) == before
