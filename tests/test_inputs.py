"""What --image names, in lists, patterns and folders; none of it is written over."""

import csv
import io
import json
import locale
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    CROP,
    LINUX,
    MODEL,
    ROOT,
    UNIX,
    FakeSearch,
    random_pixels,
    run_predict,
)
from PIL import Image

import predict
import train
import utils
from utils import UserError


@UNIX
@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-sig"])
def test_lists_as_any_system_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, end: str
) -> None:
    names = ["a b.png", "\u9854.png", '"as it stands"', "'quoted'.png"]
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    lines = ["'a b.png'", '"\u9854.png"', names[2], "", f'"{names[3]}"', '"none.png"']
    content = end.join(lines).encode(encoding.removesuffix("-be-sig"))
    if encoding == "utf-16-be-sig":
        content = b"\xfe\xff" + end.join(lines).encode("utf-16-be")
    assert predict.read_list(content) == [*names, "none.png"]


def test_lists_in_an_encoding_of_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locale, "getencoding", lambda: "cp1252")
    assert predict.read_list(b"caf\xe9.png\r\n\x81.png") == ["café.png", "\udc81.png"]


def test_a_list_on_stdin_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    paths = [tmp_path / f"{number:03}.png" for number in range(150)]
    faces = [random_pixels(number) for number in range(150)]
    for path, face in zip(paths, faces, strict=True):
        Image.fromarray(face).save(path)
    paths = paths[::-1]
    paths.insert(70, tmp_path / "missing.png")
    text = "".join(f"{path}\n" for path in paths).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
    assert run_predict("--image", "-", "--format", "json") == 1
    out, err = capsys.readouterr()
    records = [json.loads(line) for line in out.splitlines()]
    assert [record["path"] for record in records] == [str(path) for path in paths]
    assert [r["status"] for r in records].count("ok") == 150
    assert records[70]["message"] == "no such file"
    network = utils.load_model(ROOT / MODEL)
    values = network.predict(utils.to_input(np.stack(faces[::-1])))
    got = [r["confidence"] for r in records if r["status"] == "ok"]
    np.testing.assert_allclose(got, values.max(axis=1), atol=1e-4)
    assert err == f"predict.py: error: {tmp_path}/missing.png: no such file\n"


def test_patterns_that_the_shell_has_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.png", "deep/c.png", "a[1].png", "d.jpg"):
        (tmp_path / name).write_bytes(CROP.read_bytes())
    monkeypatch.chdir(tmp_path)
    for pattern, expected in {
        "?.png": ["a.png", "b.png"],
        "**/*.png": ["a.png", "a[1].png", "b.png", os.path.join("deep", "c.png")],
        "de*": [os.path.join("deep", "c.png")],
        "a[1].png": ["a[1].png"],  # a file of that name
    }.items():
        assert predict.find_images([pattern])[0] == expected
    with pytest.raises(UserError, match=r"^\*\.gif: no such file or folder$"):
        predict.find_images(["*.gif"])


def test_what_is_no_file(capsys: pytest.CaptureFixture) -> None:
    for image, reason in {
        "https://example.org/a.jpg": "a URL; save the picture, and name its file",
        "0": "no such file or folder; the camera is webcam:0",
    }.items():
        with pytest.raises(SystemExit) as stop:
            predict.main(["--image", image])
        assert stop.value.code == f"predict.py: error: {image}: {reason}"


def test_other_files_of_a_folder_are_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    crop, notes = tmp_path / "a.png", tmp_path / "notes.txt"
    crop.write_bytes(CROP.read_bytes())
    for path in (notes, tmp_path / "clip.mp4", tmp_path / "._a.png"):
        path.write_bytes(b"something else")
    assert run_predict("--image", tmp_path) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and out.startswith(f"{crop}: ")
    assert err == "predict.py: ignored, no pictures: 2\n"
    assert run_predict("--image", crop, notes) == 1
    assert (
        capsys.readouterr().err == f"predict.py: error: {notes}: {predict.NO_VIDEO}\n"
    )


@pytest.fixture
def strange(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, search: FakeSearch
) -> list[str]:
    """Return strange names of a crop, in a folder that is the current one."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    names = [
        "two\nlines.png",
        "\x1b[2Jcleared.png",
        os.fsdecode(b"latin-\xe9.png"),
        "\u202egnp.right-to-left",
        "-dash.png",
        "=1+1.png",
        "+1.png",
        "@home.png",
        "x" * 251 + ".png",
        "\u9854" * 83 + ".png",
    ]
    for name in names:
        Path(name).write_bytes(CROP.read_bytes())
    return names


ESCAPED = [
    r"two\nlines.png",
    r"\x1b[2Jcleared.png",
    r"latin-\udce9.png",
    r"\u202egnp.right-to-left",
]


@LINUX
def test_strange_names_in_text(
    strange: list[str], capsys: pytest.CaptureFixture
) -> None:
    missing = [f"no\n{name}" for name in strange[:2]]
    words = [f"--image={strange[4]}", "--model", str(ROOT / MODEL)]
    assert run_predict(*words) == 0  # a leading dash
    capsys.readouterr()
    assert run_predict("--image", *strange[:4], *strange[5:], *missing) == 1
    out, err = capsys.readouterr()
    lines = out.split("\n")
    names = [*ESCAPED, *strange[5:]]
    assert [line.rpartition(": ")[0] for line in lines] == [*names, ""]
    assert err.split("\n") == [
        rf"predict.py: error: no\n{ESCAPED[0]}: no such file",
        rf"predict.py: error: no\n{ESCAPED[1]}: no such file",
        "",
    ]
    with pytest.raises(SystemExit, match=r"error: no\\ntwo\\nlines\.png: no such file"):
        predict.main(["--image", missing[0]])


@LINUX
def test_strange_names_in_csv_and_json(
    strange: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert run_predict("--format", "csv", f"--image={strange[4]}") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [row["path"] for row in rows] == ["./-dash.png"]
    images = [*strange[:4], *strange[5:]]
    assert run_predict("--image", *images, "--format", "csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    formulas = ["./=1+1.png", "./+1.png", "./@home.png"]
    assert [row["path"] for row in rows] == [*ESCAPED, *formulas, *strange[8:]]
    assert run_predict("--image", *images, "--format", "json") == 0
    out = capsys.readouterr().out
    assert out.replace("\n", "").isascii() and "\x1b" not in out
    assert [json.loads(line)["path"] for line in out.splitlines()] == images


@LINUX
def test_strange_names_are_drawn(strange: list[str]) -> None:
    assert run_predict("--image", ".", "--plot", "drawn") == 0
    sizes = [Image.open(path).size for path in Path("drawn").iterdir()]
    assert len(sizes) == len(strange) and min(map(min, sizes)) >= 48


def test_messages_about_usage_are_safe_to_print(capsys: pytest.CaptureFixture) -> None:
    for parse, words in (  # argparse itself would print both as they are
        (predict.parse_args, ["--image", "a", "--\x1b[2J\n"]),
        (train.parse_args, ["--model-path", "\x1b[2J\n"]),
    ):
        with pytest.raises(SystemExit):
            parse(words)
        error = capsys.readouterr().err
        assert r"\x1b[2J\n" in error and "\x1b" not in error


def test_wrong_usage(capsys: pytest.CaptureFixture) -> None:
    for words in (
        ["--image", "a.jpg", "--evaluate", "b"],
        ["--image", "a.jpg", "--min-confidence", "2"],
        ["--image", "a.jpg", "--faces", "maybe"],
        ["--image", "a.jpg", "--format", "xml"],
    ):
        with pytest.raises(SystemExit) as stop:
            predict.main(words)
        assert stop.value.code == 2


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Return a folder of photos whose names are those of what would be drawn."""
    folder = tmp_path / "album"
    (folder / "sub").mkdir(parents=True)
    for name in ("mia.png", "sub/MIA.jpg", "sub/mia-emotions.png", "mia-emotions.png"):
        (folder / name).write_bytes(CROP.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return what the files below a folder hold."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refuse(capsys: pytest.CaptureFixture, line: str, *words: object) -> None:
    """Make sure that predict.py ends with a line and 2."""
    assert run_predict(*words) == 2
    assert capsys.readouterr() == ("", f"predict.py: error: {line}\n")


def test_what_was_drawn_is_drawn_anew_and_not_read(
    album: Path, capsys: pytest.CaptureFixture
) -> None:
    photos, words = contents(album), ["--image", album, "--plot", album]
    words += ["--output", album / "result.csv", "--format", "csv"]
    assert run_predict(*words) == 0
    assert capsys.readouterr() == ("", "")
    written = contents(album)
    drawn = {"mia-emotions-2.png", "MIA-emotions.png", "mia-emotions-emotions.png"}
    drawn |= {"mia-emotions-emotions-2.png"}
    assert set(written) == {*photos, *drawn, "result.csv"}
    assert written == written | photos
    rows = (album / "result.csv").read_text().splitlines()[1:]
    assert [Path(row.split(",")[0]).name for row in rows] == [
        "mia-emotions.png",
        "mia.png",
        "MIA.jpg",
        "mia-emotions.png",
    ]
    assert run_predict(*words) == 0
    assert capsys.readouterr() == ("", "")
    assert contents(album) == written


@pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
def test_the_file_drawn_into_is_no_input_of_the_next_run(
    tmp_path: Path, ending: str, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mia.png").write_bytes(CROP.read_bytes())
    target = tmp_path / f"a.{ending}"
    words = ["--image", tmp_path, "--plot", target]
    assert run_predict(*words) == 0
    first = capsys.readouterr()
    assert run_predict(*words) == 0
    assert capsys.readouterr() == first
    if ending in ("png", "jpg"):
        assert run_predict("--image", tmp_path) == 0
        assert capsys.readouterr() == first
        assert run_predict("--image", target) == 1
        message = "drawn by predict.py; name the photo itself"
        assert capsys.readouterr().err == f"predict.py: error: {target}: {message}\n"


@UNIX
@pytest.mark.parametrize("option", ["--plot", "--explain", "--output"])
def test_no_image_is_written_over(
    album: Path,
    option: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    mia = album / "mia.png"
    (album / "link.png").symlink_to("mia.png")
    os.link(mia, album / "hard.png")
    before, line = contents(album), "{}: is to be read; name another file to write"
    monkeypatch.chdir(album)
    for name in ("mia.png", "./sub/../mia.png", mia, "link.png", "hard.png"):
        refuse(capsys, line.format(mia), "--image", mia, option, name)
        refuse(capsys, line.format("link.png"), "--image", "link.png", option, name)
    refuse(capsys, line.format("sub/MIA.jpg"), "--image", "sub", option, "sub/MIA.jpg")
    Path("model.png").write_bytes((ROOT / MODEL).read_bytes())
    words = ["--model", "model.png", "--image", mia, option, "model.png"]
    refuse(capsys, line.format("model.png"), *words)
    Path("model.png").unlink()
    assert contents(album) == before


def test_no_image_of_a_list_is_written_over(
    album: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (album / "damaged.png").write_bytes(CROP.read_bytes()[:99])
    (album / "notes.txt").write_text("no picture")
    (album / "MIA-heat.png").write_bytes(CROP.read_bytes())
    before = contents(album)
    for output, named, line in (
        ("mia.png", True, "../album/mia.png: is to be read; name another file to w"),
        ("mia.png", False, "mia.png: is a picture; name another file to write"),
        ("damaged.png", False, "damaged.png: is a picture; name another file to write"),
        (
            "notes.txt",
            True,
            "../album/notes.txt: is to be read; name another file to w",
        ),
    ):
        lines = [str(CROP)] * 60 + [f"../album/{output}"] * named
        text = io.BytesIO("\n".join(lines).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
        monkeypatch.chdir(album)
        assert run_predict("--image", "-", "--output", output) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"predict.py: error: {line}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"sub/MIA.jpg\n")))
    assert run_predict("--image", "-", "--explain", ".") == 0
    assert set(contents(album)) == {*before, "MIA-heat-2.png"}
    assert contents(album) == contents(album) | before


def test_no_file_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    line = "{}: is to be written twice; name another file"
    words = ["--image", CROP, "--plot", "a.png"]
    refuse(capsys, line.format("b/../A.png"), *words, "--explain", "b/../A.png")
    refuse(capsys, line.format("a.png"), *words, "--output", "a.png")
    refuse(capsys, line.format("b"), *words[:2], "--plot", "b", "--output", "b")
    assert list(tmp_path.iterdir()) == []
    words[3] = "03-heat.png"
    assert run_predict(*words, "--explain", ".", "--output", "03-heat-2.png") == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"03-heat.png", "03-heat-2.png", "03-heat-3.png"}


def test_temporary_files_are_nobody_else_s(tmp_path: Path) -> None:
    names = {"a.png", ".a-emotions.new.txt", "a-emotions.new.png"}
    for name in names:
        (tmp_path / name).write_bytes(CROP.read_bytes())
    assert run_predict("--image", tmp_path / "a.png", "--plot", tmp_path) == 0
    assert {path.name for path in tmp_path.iterdir()} == {*names, "a-emotions.png"}
