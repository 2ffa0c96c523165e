"""Results for pictures: text, CSV, JSON, drawings; in order, and whole."""

import json
import shutil
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
    Ask,
    FakeSearch,
    file_size_limit,
    noise,
)
from PIL import Image

import predict
import utils
from utils import UserError


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
    assert len(begun) <= predict.PREFETCH_FILES
    second.set()
    assert [path for path, _ in results] == [str(n) for n in range(1, 1000)]


@pytest.fixture
def mixed(search: FakeSearch, tmp_path: Path) -> list[Path]:
    """Return a crop, a photo of two faces, and a file that is no image."""
    search.boxes = [(202, 102, 75, 75), (12, 22, 56, 56)]
    crop, broken = tmp_path / "crop.png", tmp_path / "broken.jpg"
    shutil.copy(CROP, crop)
    broken.touch()
    return [crop, noise(tmp_path / "photo.png", 400, 300), broken]


def expected(path: Path) -> list[np.ndarray]:
    """Return the probabilities, of four decimals, of an image's faces."""
    pixels = np.stack([face.pixels for face in predict.read_faces(str(path), "auto")])
    answers = utils.load_model(ROOT / MODEL).predict(utils.to_input(pixels))
    return list(answers.astype(float).round(4))


def answer(probabilities: np.ndarray) -> str:
    """Write an answer as text."""
    best = probabilities.argmax()
    return f"{EMOTIONS[best].capitalize()} ({100 * probabilities[best]:.1f} %)"


def test_text_of_one_face(ask: Ask) -> None:
    (probabilities,) = expected(CROP)
    lines = [
        f"{EMOTIONS[i].capitalize():8}  {100 * probabilities[i]:5.1f} %\n"
        for i in np.argsort(-probabilities, kind="stable")
    ]
    text = f"{answer(probabilities)}\n\n{''.join(lines)}"
    assert ask("--image", CROP) == (0, text, "")
    unsure = f"Unsure ({answer(probabilities).replace('(', '')}\n"
    assert ask("--image", CROP, "--min-confidence", 1)[1].startswith(unsure)


def test_text_of_several_faces(mixed: list[Path], ask: Ask) -> None:
    crop, photo, broken = mixed
    names = crop, f"{photo} face 1", f"{photo} face 2"
    answers = map(answer, expected(crop) + expected(photo))
    lines = [f"{name}: {text}\n" for name, text in zip(names, answers, strict=True)]
    error = f"predict.py: error: {broken}: empty file\n"
    assert ask("--image", *mixed) == (1, "".join(lines), error)


def test_json_and_csv(mixed: list[Path], ask: Ask) -> None:
    crop, photo, broken = map(str, mixed)
    places = [(crop, 1, 0, 0, 48, 48), (photo, 1, 10, 20, 60, 60)]
    places.append((photo, 2, 200, 100, 80, 80))
    records, rows = [], []
    answers = expected(mixed[0]) + expected(mixed[1])
    for (path, face, *box), values in zip(places, answers, strict=True):
        emotion, sure = EMOTIONS[values.argmax()], max(values)
        records.append(
            {"path": path, "time": None, "status": "unsure", "face": face}
            | dict(zip(["x", "y", "width", "height"], box, strict=True))
            | {"emotion": emotion, "confidence": sure}
            | {"probabilities": dict(zip(EMOTIONS, values, strict=True))}
            | {"message": ""}
        )
        rows.append([path, "", "unsure", face, *box, emotion, sure, *values, ""])
    error = dict.fromkeys(records[0]) | {"path": broken, "status": "error"}
    records.append(error | {"message": "empty file"})
    rows.append([broken, "", "error", *[""] * 13, "empty file"])
    words = ["--image", *mixed, "--min-confidence", 0.999, "--format"]
    code, out, _ = ask(*words, "json")
    assert code == 1
    told = list(map(json.loads, out.splitlines()))
    assert told == records and list(map(list, told)) == list(map(list, records))
    code, out, _ = ask(*words, "csv")
    assert code == 1
    header = (
        "path,time,status,face,x,y,width,height,emotion,confidence,"
        "angry,fear,happy,neutral,sad,surprise,message"
    )
    assert out.splitlines() == [header, *(",".join(map(str, row)) for row in rows)]


def test_a_photo_without_a_face(
    mixed: list[Path], search: FakeSearch, ask: Ask
) -> None:
    search.boxes = []
    code, out, err = ask("--image", *mixed[:2], "--format", "json")
    crop, photo = map(json.loads, out.splitlines())
    assert (code, crop["status"], photo["status"]) == (1, "ok", "no_face")
    assert photo["face"] is photo["emotion"] is None
    assert photo["message"] == predict.NO_FACE
    assert err == f"predict.py: error: {mixed[1]}: {predict.NO_FACE}\n"


def test_output_is_replaced_only_by_a_record(tmp_path: Path, ask: Ask) -> None:
    path, new = tmp_path / "emotions.csv", tmp_path / "new" / "folder" / "emotions.csv"
    path.write_text("old")
    assert "no such file" in ask("--image", "missing.jpg", "--output", path)[0]
    assert path.read_text() == "old"
    words = ["--image", CROP, "--format", "csv"]
    _, told, _ = ask(*words)
    for target in (path, new):
        assert ask(*words, "--output", target) == (0, "", "")
        assert target.read_text() == told
    code, _, _ = ask(*words, "--output", path / "a.csv")
    assert code.startswith(f"predict.py: error: {path / 'a.csv'}: cannot write: ")


@pytest.mark.parametrize(
    ("option", "kind"), [("--plot", "emotions"), ("--explain", "heat")]
)
def test_pictures(
    mixed: list[Path], tmp_path: Path, option: str, kind: str, ask: Ask
) -> None:
    folder, other, one = (tmp_path / name for name in ("drawn", "other", "one.png"))
    other.mkdir()
    shutil.copy(CROP, other / "crop.png")
    assert ask("--image", *mixed, other / "crop.png", option, folder)[0] == 1
    sizes = {path.name: Image.open(path).size for path in folder.iterdir()}
    assert sizes == {
        f"crop-{kind}.png": (960, 480),
        f"crop-{kind}-2.png": (960, 480),
        f"photo-{kind}.png": (1120, 480),
    }
    assert ask("--image", mixed[1], option, one)[0] == 0
    assert one.read_bytes() == (folder / f"photo-{kind}.png").read_bytes()
    code, _, err = ask("--image", *mixed, option, one)
    assert code == 2 and "name a folder" in err


def test_a_plot_has_the_picture_s_resolution(
    search: FakeSearch, tmp_path: Path, ask: Ask
) -> None:
    photo, plot = noise(tmp_path / "photo.png", 1200, 700), tmp_path / "plot.png"
    assert ask("--image", photo, "--plot", plot)[0] == 1  # no face
    drawn = Image.open(plot).convert("RGB")
    assert drawn.size == (1680, 700)
    cut = np.asarray(drawn.crop((0, 0, 1200, 700)), int)
    difference = cut - np.asarray(Image.open(photo))  # no frame, every pixel
    assert np.abs(difference).max() <= 2
    noise(photo, 3000, 2500)
    search.boxes = [(50 * n, 40 * n, 80, 80) for n in range(50)]
    assert ask("--image", photo, "--plot", plot)[0] == 0
    assert Image.open(plot).size == (2000 + 833, 1667)
    for size, faces, expected in (  # a row has 18 pixels, a picture at most 2,000
        ((1000, 500), 50, (1800 + 480, 900)),
        ((4000, 100), 2, (2000 + 480, 480)),
    ):
        noise(photo, *size)
        search.boxes = [(20 * n, 10, 80, 80) for n in range(faces)]
        assert ask("--image", photo, "--plot", plot)[0] == 0
        assert Image.open(plot).size == expected


def test_names_are_cut_between_characters(tmp_path: Path) -> None:
    path = "x" + 90 * "\u9854" + ".png"
    (picture,) = {
        predict.name_picture(tmp_path, name, "heat", set())
        for name in (path, f"sub/{path}")
    }
    assert picture == tmp_path / ("x" + 66 * "\u9854" + "-heat.png")


def test_heat_is_where_the_answer_depends_on() -> None:
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
