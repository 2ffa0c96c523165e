"""The two commands as users run them on data/demo: what they print and write.

The training's figures are compared with what predict.py says of the same images.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, EMOTIONS, MODEL
from PIL import Image

import utils


class Demo(NamedTuple):
    """A training on data/demo: its process, its model file, and its figures."""

    result: CompletedProcess
    path: Path
    metrics: dict


@pytest.fixture(scope="module")
def demo(run: Callable, checkout: Path) -> Demo:
    """Train on data/demo as README says."""
    result = run(*DEMO.split()[1:])
    assert (result.returncode, result.stderr) == (0, "")
    folder = checkout / "models"
    metrics = json.loads((folder / "metrics.json").read_text())
    return Demo(result, folder / "demo.h5", metrics)


def test_training_learns_the_demo_data(demo: Demo) -> None:
    assert demo.metrics["test"]["accuracy"] >= 0.9
    assert demo.metrics["test"]["images"] == 60


def test_stdout(demo: Demo) -> None:
    out = demo.result.stdout
    assert re.search(r"^angry +40 +10$", out, re.MULTILINE)
    assert out.count("Epoch ") == 15
    assert "\r" not in out and "\x1b" not in out  # nothing animated: no terminal
    assert "\nNot calibrated: that needs a --validation-split above 0.\n" in out
    assert utils.describe_metrics(demo.metrics, EMOTIONS) in out


def test_files(demo: Demo) -> None:
    folder = demo.path.parent
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
        assert f"  models/{name}\n" in demo.result.stdout
    for name in pictures:
        with Image.open(folder / name) as image:
            assert min(image.size) >= 400
            assert np.asarray(image.convert("L")).std() > 10
    history = pd.read_csv(folder / "history.csv", index_col="epoch")
    assert list(history.index) == list(range(1, 16))
    assert history.notna().all(axis=None)


def test_the_model_file_describes_its_training(demo: Demo) -> None:
    with h5py.File(demo.path) as file:
        names = set(file.attrs) - {"keras_version", "backend", "model_config"}
        stored = {name: json.loads(file.attrs[name]) for name in names}
    assert stored == demo.metrics
    assert stored["class_names"] == EMOTIONS
    assert (stored["image_size"], stored["rescale"]) == (48, 1 / 255)
    assert stored["arguments"]["epochs"] == 15
    assert not {"model_path", "data_dir"} & stored["arguments"].keys()
    assert stored["images"] == {"train": 240, "test": 60}
    assert set(stored["versions"]) == {"python", "tensorflow", "keras", "numpy"}


def test_predict_gives_the_same_figures(demo: Demo, run: Callable) -> None:
    result = run("predict.py", "--image", "data/demo/test", "--model", demo.path)
    assert (result.returncode, result.stderr) == (0, "")
    answers = re.findall(r"(\w+)/\d+\.png: (\w+) \(", result.stdout)
    right = [emotion == answer.lower() for emotion, answer in answers]
    assert len(right) == 60
    assert np.mean(right) == demo.metrics["test"]["accuracy"]


def test_evaluate_prints_what_training_printed(demo: Demo, run: Callable) -> None:
    result = run("predict.py", "--evaluate", "data/demo/test", "--model", demo.path)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.count("\nTest accuracy ") == 1  # no image is in train, too
    assert result.stdout in demo.result.stdout


def test_the_command_that_train_suggests_runs(demo: Demo, run: Callable) -> None:
    suggestion = demo.result.stdout.splitlines()[-1]
    assert suggestion.startswith("Now try: python predict.py --image ")
    command = suggestion.removeprefix("Now try: python ")
    assert run(*shlex.split(command)).returncode == 0
