"""Results for pictures: text, CSV, JSON, drawings; in order, and whole.

The references are the network's own answers for the faces that a stand-in finds.
"""

import contextlib
import csv
import io
import json
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CROP, EMOTIONS, UNIX, Ask, FakeSearch, file_size_limit, noise
from PIL import Image

import predict
import utils
from utils import UserError


def test_answers_come_one_by_one_in_order_each_with_its_face() -> None:
    second = threading.Event()

    class Network:
        size = 1

        def predict(self, faces: np.ndarray) -> np.ndarray:
            return 255 * faces.reshape(-1, 1)  # an answer is the face's pixel

    def read(path: str) -> list[predict.Face]:
        if path == "1":
            assert second.wait(60)
        pixel = np.full((1, 1), int(path), np.uint8)
        return int(path) % 3 * [predict.Face(pixel, (0, 0, 1, 1))]

    results = predict.predict_files(Network(), map(str, range(250)), read)
    assert next(results) == ("0", [])  # although the second is not done
    second.set()
    told = [(path, [round(p.item()) for _, p in faces]) for path, faces in results]
    assert told == [(str(n), n % 3 * [n]) for n in range(1, 250)]


@pytest.fixture
def mixed(search: FakeSearch, tmp_path: Path) -> list[Path]:
    """Return a crop, a file that is no image, and a photo of two faces."""
    search.boxes = [(202, 102, 75, 75), (12, 22, 56, 56)]
    crop, broken = tmp_path / "crop.png", tmp_path / "broken.jpg"
    shutil.copy(CROP, crop)
    broken.touch()
    return [crop, broken, noise(tmp_path / "photo.png", 400, 300)]


def test_json_and_csv(mixed: list[Path], ask: Ask) -> None:
    crop, broken, photo = map(str, mixed)
    words = ["--image", *mixed, "--min-confidence", 0.999, "--format"]
    code, out, _ = ask(*words, "json")
    records = [json.loads(line) for line in out.splitlines()]
    first, failure, *others = records
    error = {"path": broken, "status": "error", "message": "empty file"}
    assert (code, failure) == (1, dict.fromkeys(first) | error)
    faces = predict.read_faces(crop, "auto") + predict.read_faces(photo, "auto")
    pixels = np.stack([face.pixels for face in faces])
    network = utils.load_model(utils.ROOT / utils.MODEL_PATH)
    answers = network.predict(utils.to_input(pixels)).astype(float).round(4)
    places = [(crop, 1, 0, 0, 48, 48), (photo, 1, 10, 20, 60, 60)]
    places.append((photo, 2, 200, 100, 80, 80))
    for record, place, values in zip([first, *others], places, answers, strict=True):
        assert record == {
            **dict(zip(["path", "face", *predict.BOX], place, strict=True)),
            **{"time": None, "status": "unsure", "message": ""},
            "emotion": EMOTIONS[values.argmax()],
            "confidence": max(values),
            "probabilities": dict(zip(EMOTIONS, values, strict=True)),
        }
    code, out, _ = ask(*words, "csv")
    header, *rows = csv.reader(io.StringIO(out))
    assert (code, header) == (1, [*predict.CSV_COLUMNS, *EMOTIONS, "message"])
    for row, record in zip(rows, records, strict=True):
        cells = record | (record["probabilities"] or {})
        assert row == ["" if cells.get(n) is None else str(cells[n]) for n in header]


def test_text(mixed: list[Path], ask: Ask) -> None:
    crop, broken, photo = mixed
    records = predict.find_emotions(crop) + predict.find_emotions(photo)
    first, second, third = (
        f"{record['emotion'].capitalize()} ({100 * record['confidence']:.1f} %)"
        for record in records
    )
    text = f"{crop}: {first}\n{photo} face 1: {second}\n{photo} face 2: {third}\n"
    error = f"predict.py: error: {broken}: empty file\n"
    assert ask("--image", *mixed) == (1, text, error)
    rows = sorted(records[0]["probabilities"].items(), key=lambda row: -row[1])
    table = "".join(f"{n.capitalize():8}  {100 * p:5.1f} %\n" for n, p in rows)
    assert ask("--image", crop) == (0, f"{first}\n\n{table}", "")
    unsure = f"Unsure ({first.replace('(', '')}\n\n{table}"
    assert ask("--image", crop, "--min-confidence", 1) == (0, unsure, "")


def test_a_photo_without_a_face_is_said_to_have_none_and_drawn_as_it_is(
    search: FakeSearch, tmp_path: Path, ask: Ask
) -> None:
    photo, plot = noise(tmp_path / "photo.png", 1200, 700), tmp_path / "plot.png"
    code, out, err = ask("--image", photo, "--format", "json", "--plot", plot)
    told = {name: value for name, value in json.loads(out).items() if value}
    record = {"path": str(photo), "status": "no_face", "message": predict.NO_FACE}
    assert (code, told) == (1, record)
    assert err == f"predict.py: error: {photo}: {predict.NO_FACE}\n"
    drawn = Image.open(plot).convert("RGB")
    assert drawn.size == (1680, 700)
    cut = np.asarray(drawn.crop((0, 0, 1200, 700)), int)
    difference = cut - np.asarray(Image.open(photo))  # no frame, every pixel
    assert np.abs(difference).max() <= 2


def test_output_is_replaced_only_by_a_record(tmp_path: Path, ask: Ask) -> None:
    path, words = tmp_path / "new" / "a.csv", ["--image", CROP, "--format", "csv"]
    _, told, _ = ask(*words)
    assert ask(*words, "--output", path) == (0, "", "")
    assert path.read_text() == told
    assert "no such file" in ask("--image", "missing.jpg", "--output", path)[0]
    predict.Output(path, "csv", EMOTIONS)  # without a record
    assert path.read_text() == told
    code, _, _ = ask(*words, "--output", path / "b.csv")
    assert code.startswith(f"predict.py: error: {path / 'b.csv'}: cannot write: ")


def test_pictures(mixed: list[Path], tmp_path: Path, ask: Ask) -> None:
    folder, other = tmp_path / "drawn", tmp_path / "other" / "crop.png"
    other.parent.mkdir()
    shutil.copy(CROP, other)
    words = ["--plot", folder, "--explain", folder]
    assert ask("--image", *mixed, other, *words)[0] == 1
    names = {"crop-emotions.png", "crop-emotions-2.png", "photo-emotions.png"}
    names |= {"crop-heat.png", "crop-heat-2.png", "photo-heat.png"}
    assert {path.name for path in folder.iterdir()} == names
    plot, heat = folder / "crop-emotions.png", folder / "crop-heat.png"
    assert plot.read_bytes() != heat.read_bytes()


@UNIX
def test_a_full_disk_leaves_the_old_plot(tmp_path: Path, ask: Ask) -> None:
    plot = tmp_path / "plot.jpg"
    with file_size_limit(2000):
        code, _, _ = ask("--image", CROP, "--plot", plot)
    assert code.startswith(f"predict.py: error: {plot}: cannot write: ")
    assert list(tmp_path.iterdir()) == []


def test_heat_is_where_the_answer_depends_on() -> None:
    class Network:
        """Is the surer of class 0 the brighter a patch of the face is."""

        def predict(self, faces: np.ndarray, tta: bool) -> np.ndarray:
            bright = faces[:, 20:24, 30:34, 0].mean(axis=(1, 2))
            return np.stack([bright, 1 - bright], axis=1)

    pixels = np.zeros((48, 48), np.uint8)
    pixels[20:24, 30:34] = 255
    heat = predict.occlude(Network(), pixels, np.array([0.9, 0.1]))
    assert heat[20:24, 30:34].min() > 0.5 and heat.max() == 1
    far = np.abs(np.mgrid[-22:26, -32:16]).max(axis=0) > 16
    assert heat[far].max() == 0
    assert predict.occlude(Network(), pixels, np.array([0.1, 0.9])).max() == 0


@UNIX
def test_a_full_disk_is_reported(tmp_path: Path) -> None:
    path, record = tmp_path / "emotions.csv", "x" * 99 + "\n"
    output = predict.Output(path, "csv", EMOTIONS)
    with (
        file_size_limit(1050),
        pytest.raises(UserError, match=r"emotions\.csv: cannot write: "),
    ):
        for _ in range(20):
            output.write(record)
    assert path.read_text().startswith(10 * record)


@UNIX
def test_a_full_disk_below_stdout_is_reported_once(tmp_path: Path) -> None:
    output = predict.Output(None, "csv", EMOTIONS)
    with (
        file_size_limit(50),
        open(tmp_path / "emotions.csv", "w") as stdout,
        contextlib.redirect_stdout(stdout),
        pytest.raises(UserError, match=r"^stdout: cannot write: "),
    ):
        output.write("x" * 99 + "\n")
