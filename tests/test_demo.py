"""The two commands as users run them on data/demo: what they print and write.

The training's figures are compared with what predict.py says of the same images, and
the probabilities that predict.py prints with those of the model itself.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, EMOTIONS, MODEL, ROOT
from PIL import Image

import predict
import utils

FACE = "data/demo/test/surprise/02.png"


@pytest.fixture(scope="session")
def demo(run: Callable, checkout: Path) -> dict:
    """Train on data/demo as README says; return the model's path and the run."""
    return {"path": checkout / "models" / "demo.h5", "result": run(*DEMO.split()[1:])}


def test_the_demo_data_are_learned(demo: dict) -> None:
    result = demo["result"]
    assert (result.returncode, result.stderr) == (0, "")
    metrics = json.loads((demo["path"].parent / "metrics.json").read_text())
    assert metrics["test"]["accuracy"] >= 0.9
    assert metrics["test"]["images"] == 60


def test_stdout(demo: dict) -> None:
    out = demo["result"].stdout
    metrics = json.loads((demo["path"].parent / "metrics.json").read_text())
    for name, place in {"test": "all", "leak_free": "not also in train"}.items():
        part = metrics[name]
        accuracy = part["accuracy"]
        spread = 196 * (accuracy * (1 - accuracy) / 60) ** 0.5
        assert (
            f"\nTest accuracy {100 * accuracy:.1f} % ± {spread:.1f} % "
            f"(60 images, {place}; 95 % interval)\n"
            f"  balanced accuracy {100 * part['macro_recall']:.1f} %, "
            f"always angry 16.7 %, "
            f"calibration error (ECE) {part['calibration_error']:.3f}\n"
        ) in out
    assert "\nNot calibrated: that needs a --validation-split above 0.\n" in out
    assert re.search(r"^angry +40 +10$", out, re.MULTILINE)
    for row, name in enumerate(EMOTIONS):
        counts = map(str, metrics["test"]["confusion_matrix"][row])
        for columns in (r"[\d.]+ +[\d.]+ +[\d.]+ +10", " +".join(counts)):
            assert re.search(rf"^ *{name} +{columns}$", out, re.MULTILINE)
    assert out.count("Epoch ") == 15
    assert "\r" not in out and "\x1b" not in out  # nothing animated: no terminal
    command = out.splitlines()[-1].removeprefix("Now try: python ").split()
    assert command[0] == "predict.py"
    assert Path(ROOT, command[2]).is_file()


def test_files(demo: dict) -> None:
    folder = demo["path"].parent
    pictures = {
        "class_distribution.png",
        "confusion_matrix.png",
        "example_images.png",
        "learning_curves.png",
        "reliability.png",
    }
    names = {path.name for path in folder.iterdir()} - {Path(MODEL).name}
    assert names == pictures | {"demo.h5", "history.csv", "metrics.json"}
    for name in names:
        assert f"  models/{name}\n" in demo["result"].stdout
    for name in pictures:
        with Image.open(folder / name) as image:
            assert min(image.size) >= 400
            assert np.asarray(image.convert("L")).std() > 10
    history = pd.read_csv(folder / "history.csv", index_col="epoch")
    assert list(history.index) == list(range(1, 16))
    assert history.notna().all(axis=None)


def test_the_model_file_tells_about_itself(demo: dict) -> None:
    with h5py.File(demo["path"]) as file:
        keras_own = {"keras_version", "backend", "model_config"}
        names = set(file.attrs) - keras_own
        stored = {name: json.loads(file.attrs[name]) for name in names}
    assert stored["class_names"] == EMOTIONS
    assert (stored["image_size"], stored["rescale"]) == (48, 1 / 255)
    assert stored["arguments"]["epochs"] == 15
    assert not {"model_path", "data_dir"} & stored["arguments"].keys()
    assert stored["images"] == {"train": 240, "test": 60}
    assert set(stored["versions"]) == {"python", "tensorflow", "keras", "numpy"}
    metrics = json.loads((demo["path"].parent / "metrics.json").read_text())
    assert stored == metrics


def test_predict_gives_the_same_figures(demo: dict, run: Callable) -> None:
    result = run("predict.py", "--image", "data/demo/test", "--model", demo["path"])
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    right = sum(
        Path(ln).parent.name == ln.split(": ")[1].split()[0].lower() for ln in lines
    )
    metrics = json.loads((demo["path"].parent / "metrics.json").read_text())
    assert len(lines) == 60
    assert right / 60 == metrics["test"]["accuracy"]


def test_the_command_that_train_suggests_runs(demo: dict, run: Callable) -> None:
    command = demo["result"].stdout.splitlines()[-1].partition("python ")[2]
    assert run(*shlex.split(command)).returncode == 0


@pytest.fixture(scope="session")
def expected(demo: dict) -> np.ndarray:
    """Return the probabilities of FACE, the mean of all views."""
    network = utils.load_model(demo["path"])
    faces = utils.to_input(utils.read_pixels(ROOT / FACE)[np.newaxis])
    return network.predict(faces)[0]


def test_one_image(demo: dict, run: Callable, expected: np.ndarray) -> None:
    result = run("predict.py", "--image", FACE, "--model", demo["path"])
    rounded = [100 * round(float(p), 4) for p in expected]
    percent = dict(zip(map(str.capitalize, EMOTIONS), rounded, strict=True))
    best = max(percent, key=percent.get)
    rows = sorted(percent.items(), key=lambda row: -row[1])
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{best} ({percent[best]:.1f} %)\n\n" + "".join(
        f"{name:<8}  {value:5.1f} %\n" for name, value in rows
    )


def test_several_images_and_a_broken_one(
    demo: dict, tmp_path: Path, capsys: pytest.CaptureFixture, expected: np.ndarray
) -> None:
    (tmp_path / "deep").mkdir()
    face = (ROOT / FACE).read_bytes()
    for name in ("b.png", "deep/a.PNG"):
        (tmp_path / name).write_bytes(face)
    (tmp_path / "a.jpg").write_bytes(face[:400])
    images = [str(ROOT / FACE), str(tmp_path)]
    code = predict.main(["--model", str(demo["path"]), "--image", *images])
    out, err = capsys.readouterr()
    best = expected.argmax()
    answer = f"{EMOTIONS[best].capitalize()} ({100 * expected[best]:.1f} %)"
    paths = [ROOT / FACE, tmp_path / "b.png", tmp_path / "deep" / "a.PNG"]
    assert code == 1
    assert out == "".join(f"{path}: {answer}\n" for path in paths)
    assert err.startswith(f"predict.py: error: {tmp_path / 'a.jpg'}: ")
    assert err.count("\n") == 1


def test_evaluate_prints_what_training_printed(demo: dict, run: Callable) -> None:
    words = ["--evaluate", "data/demo/test", "--model", demo["path"]]
    result = run("predict.py", *words)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\nTest accuracy ") == 2
    assert result.stdout in demo["result"].stdout


def test_evaluate_names_what_it_cannot_read(
    demo: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(ROOT / "data" / "demo" / "test", tmp_path / "mine")
    broken = folder / "sad" / "broken.png"
    broken.write_bytes(b"")
    words = ["--model", str(demo["path"]), "--evaluate"]
    code = predict.main([*words, str(folder)])
    out, err = capsys.readouterr()
    assert code == 1
    assert err == f"predict.py: error: {broken}: empty file\n"
    assert "(60 images, all;" in out
    assert "not also in train" not in out  # no train/ beside it: nobody knows
    with pytest.raises(SystemExit, match=rf"{tmp_path}/none: no such folder"):
        predict.main([*words, str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"no folder angry, .*instead: mine"):
        predict.main([*words, str(tmp_path)])


def test_evaluate_beside_a_train_folder_of_other_classes(
    demo: dict, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(ROOT / "data" / "demo" / "test", tmp_path / "test")
    (tmp_path / "train" / "cat").mkdir(parents=True)
    code = predict.main(["--model", str(demo["path"]), "--evaluate", str(folder)])
    out, err = capsys.readouterr()
    assert code == 0
    assert "(60 images, all;" in out
    assert "not also in train" not in out
    assert err.startswith("predict.py: not compared with the images of train: ")
    assert err.endswith("found instead: cat\n")
    assert err.count("\n") == 1
