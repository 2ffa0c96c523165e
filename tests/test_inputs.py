"""What --image names, in lists, patterns and folders; none of it is written over."""

import codecs
import csv
import io
import json
import locale
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CROP, LINUX, MODEL, ROOT, UNIX, Ask, FakeSearch, random_pixels
from PIL import Image

import predict
import train
import utils
from utils import UserError


@UNIX
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
    ],
)
def test_lists_as_any_system_writes_them(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mark: bytes,
    encoding: str,
    end: str,
) -> None:
    names = ["a b.png", "\u9854.png", '"as it stands"', "'quoted'.png"]
    monkeypatch.chdir(tmp_path)
    for name in names:
        Path(name).touch()
    lines = ["'a b.png'", '"\u9854.png" ', names[2], "", f'"{names[3]}"', '"none.png"']
    content = mark + end.join(lines).encode(encoding)
    assert predict.read_list(content) == [*names, "none.png"]


def test_lists_in_an_encoding_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1252")
    content = codecs.BOM_UTF8 + b"caf\xe9.png\r\n\x81.png"
    assert predict.read_list(content) == ["café.png", "\udc81.png"]


def give_list(monkeypatch: pytest.MonkeyPatch, lines: list[object]) -> None:
    """Put a list of paths on stdin."""
    content = "".join(f"{line}\n" for line in lines).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_a_list_on_stdin_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    paths = [tmp_path / f"{number:03}.png" for number in range(150, 0, -1)]
    faces = [random_pixels(number) for number in range(150)]
    for path, face in zip(paths, faces, strict=True):
        Image.fromarray(face).save(path)
    paths.insert(70, tmp_path / "missing.png")
    give_list(monkeypatch, paths)
    code, out, err = ask("--image", "-", "--format", "json")
    assert (code, err) == (
        1,
        f"predict.py: error: {paths[70]}: no such file or folder\n",
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["path"] for record in records] == list(map(str, paths))
    assert records.pop(70)["message"] == "no such file or folder"
    values = utils.load_model(ROOT / MODEL).predict(utils.to_input(np.stack(faces)))
    got = [record["confidence"] for record in records]
    np.testing.assert_allclose(got, values.max(axis=1), atol=1e-4)


def test_patterns_that_the_shell_did_not_expand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("deep", "c.png")
    os.mkdir("deep")
    for name in ("b.png", "a.png", deep, "a[1].png", "d.jpg"):
        shutil.copy(CROP, name)
    for pattern, expected in {
        "?.png": ["a.png", "b.png"],
        "**/*.png": ["a.png", "a[1].png", "b.png", deep],
        "de*": [deep],
        "**": ["a.png", "a[1].png", "b.png", "d.jpg", deep],
        "a[1].png": ["a[1].png"],  # a file of that name
    }.items():
        assert predict.find_images([pattern])[0] == expected
    with pytest.raises(UserError, match=r"^\*\.gif: no such file or folder$"):
        predict.find_images(["*.gif"])


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ("https://example.org/a.jpg", "a URL; save the picture, and name its file"),
        ("0", "no such file or folder; the camera is webcam:0"),
    ],
)
def test_names_without_a_file(image: str, reason: str, ask: Ask) -> None:
    line = f"predict.py: error: {image}: {reason}"
    assert ask("--image", image)[0] == line
    code, _, err = ask("--image", CROP, image)
    assert (code, err) == (1, f"{line}\n")


def test_other_files_of_a_folder_are_ignored(tmp_path: Path, ask: Ask) -> None:
    crop = shutil.copy(CROP, tmp_path)
    notes = tmp_path / "notes.txt"
    for path in (notes, tmp_path / "._a.png"):
        path.write_bytes(b"something else")
    shutil.copy(ROOT / "data" / "astronaut.mp4", tmp_path)
    code, out, err = ask("--image", tmp_path)
    assert (code, err) == (0, "predict.py: ignored, no pictures: 2\n")
    assert out.count("\n") == 1 and out.startswith(f"{crop}: ")
    code, _, err = ask("--image", crop, notes)
    line = f"predict.py: error: {{}}: {predict.NO_VIDEO}\n"
    assert (code, err) == (1, line.format(notes))
    Path(crop).unlink()
    assert ask("--image", tmp_path) == (1, "", "predict.py: ignored, no pictures: 2\n")
    broken = notes.rename(tmp_path / "notes.jpg")  # whose name says that it is one
    assert ask("--image", tmp_path)[2].startswith(line.format(broken))


# Strange names, as text shows them, which CSV does, too. The last are of 255 bytes.
STRANGE = {
    "two\nlines.png": r"two\nlines.png",
    "\x1b[2Jcleared.png": r"\x1b[2Jcleared.png",
    "latin-\udce9.png": r"latin-\udce9.png",
    "\u202egnp.right-to-left": r"\u202egnp.right-to-left",
    **{name: name for name in ("=1+1.png", "+1.png", "@home.png")},
    **{name: name for name in ("x" * 251 + ".png", "\u9854" * 83 + ".png")},
}
DASH = "-dash.png"


@pytest.fixture
def strange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: FakeSearch
) -> None:
    """Give a crop strange names, in a folder that is the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (*STRANGE, DASH):
        shutil.copy(CROP, name)


@LINUX
@pytest.mark.usefixtures("strange")
def test_strange_names_in_text(ask: Ask) -> None:
    assert ask(f"--image={DASH}")[0] == 0
    code, out, err = ask("--image", *STRANGE, "no\ntwo\nlines.png", "no\n\x1b[2J")
    assert code == 1
    names = [line.rpartition(": ")[0] for line in out.split("\n")]
    assert names == [*STRANGE.values(), ""]
    assert err == (
        r"predict.py: error: no\ntwo\nlines.png: no such file or folder" + "\n"
        r"predict.py: error: no\n\x1b[2J: no such file or folder" + "\n"
    )
    line = r"predict.py: error: no\ntwo\nlines.png: no such file or folder"
    assert ask("--image", "no\ntwo\nlines.png")[0] == line


@LINUX
@pytest.mark.usefixtures("strange")
def test_strange_names_in_csv_and_json(ask: Ask) -> None:
    code, out, _ = ask("--format", "csv", f"--image={DASH}")
    assert code == 0 and out.splitlines()[1].startswith("./-dash.png,")
    code, out, _ = ask("--format", "csv", "--image", *STRANGE)
    paths = [row["path"] for row in csv.DictReader(io.StringIO(out))]
    safe = ["./" * name.startswith(("=", "+", "@")) + name for name in STRANGE.values()]
    assert (code, paths) == (0, safe)  # a spreadsheet would take some for formulas
    code, out, _ = ask("--format", "json", "--image", *STRANGE)
    assert code == 0 and out.replace("\n", "").isascii() and "\x1b" not in out
    assert [json.loads(line)["path"] for line in out.splitlines()] == [*STRANGE]


@LINUX
@pytest.mark.usefixtures("strange")
def test_strange_names_are_drawn(ask: Ask) -> None:
    assert ask("--image", ".", "--plot", "drawn")[0] == 0
    sizes = [Image.open(path).size for path in Path("drawn").iterdir()]
    assert len(sizes) == len(STRANGE) + 1 and min(map(min, sizes)) >= 48


def test_messages_about_usage_are_safe_to_print(capsys: pytest.CaptureFixture) -> None:
    for parse, words in (  # argparse itself would print both as they are
        (predict.parse_args, ["--image", "a", "--\x1b[2J\n"]),
        (train.parse_args, ["--model-path", "\x1b[2J\n"]),
    ):
        with pytest.raises(SystemExit):
            parse(words)
        error = capsys.readouterr().err
        assert r"\x1b[2J\n" in error and "\x1b" not in error


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--image a.jpg --evaluate b", "not allowed with argument --image"),
        ("--image a.jpg --min-confidence 2", "--min-confidence: 2.0 is not in [0, 1]"),
        ("--image a.jpg --faces maybe", "invalid choice: 'maybe'"),
        ("--image a.jpg --format xml", "invalid choice: 'xml'"),
        ("--image a.jpg --fps 0", "--fps: 0.0 is not above 0, up to 1000"),
        ("--evaluate b --fps 9", "--fps makes no sense with --evaluate"),
        ("--evaluate b --format csv", "--format csv makes no sense with --evaluate"),
        ("--evaluate b --explain a", "--explain makes no sense with --evaluate"),
        ("--evaluate b --faces never", "--faces makes no sense with --evaluate"),
        (
            "--evaluate b --min-confidence 1",
            "--min-confidence makes no sense with --evaluate",
        ),
    ],
)
def test_wrong_usage(words: str, reason: str, ask: Ask) -> None:
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


def refused(line: str) -> tuple[int, str, str]:
    """Return how predict.py ends, as of ask, if it refuses to write."""
    return 2, "", f"predict.py: error: {line}\n"


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
    assert contents(album) == written


@pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
def test_a_drawn_file_is_not_read_by_the_next_run(
    tmp_path: Path, ending: str, ask: Ask
) -> None:
    shutil.copy(CROP, tmp_path / "mia.png")
    target = tmp_path / f"a.{ending}"
    words = ["--image", tmp_path, "--plot", target]
    first = ask(*words)
    assert first[0] == 0 and ask(*words) == first
    if ending in ("png", "jpg"):
        assert ask("--image", tmp_path) == first
        line = f"{target}: drawn by predict.py; name the photo itself"
        code, _, err = ask("--image", target)
        assert (code, err) == (1, f"predict.py: error: {line}\n")


@UNIX
@pytest.mark.parametrize("option", ["--plot", "--explain", "--output"])
def test_no_input_is_overwritten(album: Path, option: str, ask: Ask) -> None:
    mia = album / "mia.png"
    (album / "link.png").symlink_to("mia.png")
    os.link(mia, album / "hard.png")
    before, line = contents(album), "{}: is an input; name another file to write"
    for name in ("mia.png", "./sub/../mia.png", mia, "link.png", "hard.png"):
        for image in (mia, "link.png"):
            assert ask("--image", image, option, name) == refused(line.format(image))
    words = ["--image", "sub", option, "sub/MIA.jpg"]
    assert ask(*words) == refused(line.format("sub/MIA.jpg"))
    shutil.copy(ROOT / MODEL, "model.png")
    words = ["--model", "model.png", "--image", mia, option, "model.png"]
    assert ask(*words) == refused(line.format("model.png"))
    Path("model.png").unlink()
    assert contents(album) == before


def test_output_replaces_no_picture_and_nothing_listed(
    album: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    (album / "damaged.png").write_bytes(CROP.read_bytes()[:99])
    (album / "notes.txt").write_text("no picture")
    before = contents(album)
    for output, more, line in (
        ("mia.png", [], "mia.png: is a picture"),
        ("damaged.png", [], "damaged.png: is a picture"),
        ("notes.txt", ["../album/notes.txt"], "../album/notes.txt: is an input"),
    ):
        give_list(monkeypatch, [CROP] * 60 + more)
        line = f"{line}; name another file to write"
        assert ask("--image", "-", "--output", output) == refused(line)
    assert contents(album) == before


@pytest.mark.parametrize("option", ["--plot", "--explain"])
def test_a_picture_is_replaced_only_if_it_was_drawn(
    album: Path, option: str, ask: Ask
) -> None:
    before = contents(album)
    words = ["--image", CROP, option]
    line = "mia.png: is a picture; name another file to write"
    assert ask(*words, "mia.png") == refused(line)
    assert contents(album) == before
    assert ask(*words, "new.png")[0] == ask(*words, "new.png")[0] == 0


def test_no_file_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Ask
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["--plot", "a.png", "--explain", "b/../A.png"],
        ["--plot", "a.png", "--output", "a.png"],
        ["--plot", "b", "--output", "b"],
    ):
        line = f"{words[3]}: two options name this file; name another one"
        assert ask("--image", CROP, *words) == refused(line)
    assert list(tmp_path.iterdir()) == []
    assert ask("--image", CROP, "--plot", "03-heat.png", "--explain", ".")[0] == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"03-heat.png", "03-heat-2.png"}
    line = "a.mp4: is no name for text; name another file to write"
    assert ask("--image", CROP, "--output", "a.mp4") == refused(line)


def test_temporary_files_never_hit_files_of_the_user(tmp_path: Path, ask: Ask) -> None:
    names = {"a.png", ".a-emotions.new.txt", "a-emotions.new.png"}
    for name in names:
        shutil.copy(CROP, tmp_path / name)
    assert ask("--image", tmp_path / "a.png", "--plot", tmp_path)[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a-emotions.png"}
