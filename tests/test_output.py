"""What is told of pictures: text, CSV, JSON, drawings; in order, and whole."""

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    CROP,
    EMOTIONS,
    LINUX,
    MODEL,
    ROOT,
    UNIX,
    FakeSearch,
    file_size_limit,
    noise,
    run_predict,
)
from PIL import Image

import predict
import utils
from utils import UserError


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Write a picture of 400 x 300 pixels."""
    return noise(tmp_path / "photo.png", 400, 300)


def test_records_come_one_by_one_and_in_order() -> None:
    second, begun = threading.Event(), []

    def paths() -> Iterator[str]:
        for number in range(1000):
            begun.append(number)
            yield str(number)

    def read(path: str) -> list:
        if path == "1":
            assert second.wait(60)
        return []

    results = predict.predict_files(utils.load_model(ROOT / MODEL), paths(), read)
    assert next(results) == ("0", [])  # although the second is not done
    assert len(begun) <= predict.AHEAD
    second.set()
    assert [path for path, _ in results] == [str(n) for n in range(1, 1000)]


@pytest.fixture
def mixed(search: FakeSearch, tmp_path: Path, photo: Path) -> list[Path]:
    """Return a crop, a photo of two faces, and a file that is no image."""
    search.boxes = [(202, 102, 75, 75), (12, 22, 56, 56)]
    crop, broken = tmp_path / "crop.png", tmp_path / "broken.jpg"
    crop.write_bytes(CROP.read_bytes())
    broken.write_bytes(b"")
    return [crop, photo, broken]


def expected(path: Path, faces: str = "auto") -> list[np.ndarray]:
    """Return the probabilities of an image's faces."""
    network = utils.load_model(ROOT / MODEL)
    found = predict.read_faces(str(path), faces)
    pixels = np.stack([face.pixels for face in found])
    return list(network.predict(utils.to_input(pixels)))


def test_text(mixed: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert run_predict("--image", *mixed) == 1
    out, err = capsys.readouterr()
    crop, photo, broken = mixed
    answers = []
    for probabilities in [*expected(crop), *expected(photo)]:
        best = probabilities.argmax()
        answers.append(
            f"{EMOTIONS[best].capitalize()} ({100 * max(probabilities):.1f} %)"
        )
    assert out == (
        f"{crop}: {answers[0]}\n{photo} face 1: {answers[1]}\n"
        f"{photo} face 2: {answers[2]}\n"
    )
    assert err == f"predict.py: error: {broken}: empty file\n"


def test_csv(mixed: list[Path], capsys: pytest.CaptureFixture) -> None:
    assert (
        run_predict("--image", *mixed, "--format", "csv", "--min-confidence", 0.999)
        == 1
    )
    out = capsys.readouterr().out
    header = (
        "path,time,status,face,x,y,width,height,emotion,confidence,"
        "angry,fear,happy,neutral,sad,surprise,message"
    )
    assert out.splitlines()[0] == header
    rows = list(csv.DictReader(io.StringIO(out)))
    crop, photo, broken = map(str, mixed)
    assert [row["path"] for row in rows] == [crop, photo, photo, broken]
    assert [row["status"] for row in rows] == ["unsure", "unsure", "unsure", "error"]
    assert [row["face"] for row in rows] == ["1", "1", "2", ""]
    places = [[row[n] for n in ("x", "y", "width", "height")] for row in rows]
    assert places == [
        ["0", "0", "48", "48"],
        ["10", "20", "60", "60"],
        ["200", "100", "80", "80"],
        ["", "", "", ""],
    ]
    for row, probabilities in zip(
        rows, [*expected(mixed[0]), *expected(mixed[1])], strict=False
    ):
        rounded = [str(round(float(p), 4)) for p in probabilities]
        assert [row[name] for name in EMOTIONS] == rounded
        assert row["confidence"] == rounded[probabilities.argmax()]
        assert row["emotion"] == EMOTIONS[probabilities.argmax()]
        assert row["message"] == ""
    assert out.splitlines()[-1] == f"{broken},,error,{',' * 13}empty file"


def test_json(
    mixed: list[Path], search: FakeSearch, capsys: pytest.CaptureFixture
) -> None:
    search.boxes = []
    assert run_predict("--image", *mixed, "--format", "json") == 1
    out, err = capsys.readouterr()
    crop, photo, broken = map(json.loads, out.splitlines())
    (probabilities,) = expected(mixed[0])
    assert crop == {
        "path": str(mixed[0]),
        "time": None,
        "status": "ok",
        "face": 1,
        "x": 0,
        "y": 0,
        "width": 48,
        "height": 48,
        "emotion": EMOTIONS[probabilities.argmax()],
        "confidence": pytest.approx(max(probabilities), abs=5e-5),
        "probabilities": pytest.approx(
            dict(zip(EMOTIONS, probabilities, strict=True)), abs=5.1e-5
        ),
        "message": "",
    }
    assert (photo["status"], photo["face"], photo["emotion"]) == ("no_face", None, None)
    assert (broken["status"], broken["message"]) == ("error", "empty file")
    assert "--faces never" in photo["message"]
    assert err.splitlines() == [
        f"predict.py: error: {mixed[1]}: {photo['message']}",
        f"predict.py: error: {mixed[2]}: empty file",
    ]


def test_unsure(capsys: pytest.CaptureFixture) -> None:
    assert run_predict("--image", CROP, "--min-confidence", 1) == 0
    probabilities = expected(CROP)[0]
    emotion = EMOTIONS[probabilities.argmax()].capitalize()
    line = f"Unsure ({emotion} {probabilities.max():.1%})".replace("%", " %")
    assert capsys.readouterr().out.splitlines()[0] == line


def test_output_is_replaced_only_by_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "emotions.csv"
    path.write_text("old")
    with pytest.raises(SystemExit, match="no such file"):
        predict.main(["--image", "missing.jpg", "--output", str(path)])
    assert path.read_text() == "old"
    assert run_predict("--image", CROP, "--format", "csv", "--output", path) == 0
    assert capsys.readouterr() == ("", "")
    assert run_predict("--image", CROP, "--format", "csv") == 0
    assert path.read_text() == capsys.readouterr().out
    new = tmp_path / "new" / "folder" / path.name
    assert run_predict("--image", CROP, "--format", "csv", "--output", new) == 0
    assert new.read_text() == path.read_text()
    with pytest.raises(SystemExit, match=r"emotions\.csv/a\.csv: cannot write: "):
        predict.main(["--image", str(CROP), "--output", str(path / "a.csv")])


@pytest.mark.parametrize("option", ["--plot", "--explain"])
def test_pictures(
    mixed: list[Path], tmp_path: Path, option: str, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "drawn"
    other = tmp_path / "other" / "crop.png"
    other.parent.mkdir()
    other.write_bytes(mixed[0].read_bytes())
    assert run_predict("--image", *mixed, other, option, folder) == 1
    names = {path.name for path in folder.iterdir()}
    kind = {"--plot": "emotions", "--explain": "heat"}[option]
    assert names == {f"crop-{kind}.png", f"crop-{kind}-2.png", f"photo-{kind}.png"}
    for path in folder.iterdir():
        with Image.open(path) as image:
            assert image.size == ((960, 480) if "crop" in path.name else (1120, 480))
    assert run_predict("--image", mixed[1], option, tmp_path / "one.png") == 0
    drawn = folder / f"photo-{kind}.png"
    assert (tmp_path / "one.png").read_bytes() == drawn.read_bytes()
    with pytest.raises(SystemExit, match="name a folder"):
        predict.main(["--image", *map(str, mixed), option, "one.png"])


def test_a_plot_has_the_picture_s_resolution(
    search: FakeSearch, tmp_path: Path
) -> None:
    photo, plot = noise(tmp_path / "photo.png", 1200, 700), tmp_path / "plot.png"
    assert run_predict("--image", photo, "--plot", plot) == 1  # no face
    with Image.open(photo) as image, Image.open(plot) as drawn:
        assert drawn.size == (1680, 700)
        cut = drawn.convert("RGB").crop((0, 0, 1200, 700))
        difference = np.asarray(cut, int) - np.asarray(image)  # no frame, every pixel
        assert np.abs(difference).max() <= 2
    noise(photo, 3000, 2500)
    search.boxes = [(50 * n, 40 * n, 80, 80) for n in range(50)]
    assert run_predict("--image", photo, "--plot", plot) == 0
    with Image.open(plot) as drawn:
        assert drawn.size == (2000 + 833, 1667)


def test_names_are_cut_between_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(name: bytes) -> str:
        return name.decode()  # as Windows does: without surrogates for broken bytes

    monkeypatch.setattr(os, "fsdecode", decode)
    path = "x" + 90 * "\u9854" + ".png"
    (picture,) = {
        predict.name_picture(tmp_path, name, "heat", set())
        for name in (path, f"sub/{path}")
    }
    assert picture == tmp_path / ("x" + 66 * "\u9854" + "-heat.png")


def test_heat_is_where_an_answer_rests() -> None:
    class Network:
        """Is the surer of class 0 the brighter a patch of the face is."""

        def predict(self, faces: np.ndarray, tta: bool) -> np.ndarray:
            bright = faces[:, 20:24, 30:34, 0].mean(axis=(1, 2))
            return np.stack([bright, 1 - bright], axis=1)

    pixels = np.zeros((48, 48), np.uint8)
    pixels[20:24, 30:34] = 255
    heat = predict.occlude(Network(), pixels, np.array([0.9, 0.1]))
    assert heat.shape == (48, 48)
    assert heat[20:24, 30:34].min() > 0.5 and heat.max() == 1
    far = np.abs(np.mgrid[-22:26, -32:16]).max(axis=0) > 16
    assert heat[far].max() == 0
    assert predict.occlude(Network(), pixels, np.array([0.1, 0.9])).max() == 0


@UNIX
def test_a_full_disk_leaves_whole_records(tmp_path: Path) -> None:
    path, record = tmp_path / "emotions.csv", "x" * 99 + "\n"
    output = predict.Output(path, "csv", EMOTIONS)
    with (
        file_size_limit(1050),
        pytest.raises(UserError, match=r"emotions\.csv: cannot write: "),
    ):
        for _ in range(20):
            output.write(record)
    assert path.read_text() == 10 * record


@LINUX
def test_a_full_stdout() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, ROOT / "predict.py", "--image", CROP]
        result = subprocess.run(
            words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "predict.py: error: stdout: cannot write: No space left on device\n"
    assert (result.returncode, result.stderr) == (1, line)
