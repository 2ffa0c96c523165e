"""The two commands as users run them on data/demo: what they print and write.

The training's figures are compared with what predict.py says of the same images.
"""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import DEMO, EMOTIONS, MODEL
from PIL import Image

import utils


class Demo(NamedTuple):
    """A training on data/demo: its stdout, its model file, and its figures."""

    out: str
    path: Path
    metrics: dict


@pytest.fixture(scope="module")
def demo(run: Callable, checkout: Path) -> Demo:
    """Train on data/demo as README says."""
    result = run(*DEMO.split()[1:])
    assert (result.returncode, result.stderr) == (0, "")
    folder = checkout / "models"
    metrics = json.loads((folder / "metrics.json").read_text())
    return Demo(result.stdout, folder / "demo.h5", metrics)


def test_training_learns_and_says_how_well(demo: Demo) -> None:
    assert demo.metrics["test"]["accuracy"] >= 0.9
    assert utils.describe_metrics(demo.metrics, EMOTIONS) in demo.out
    assert "\nNot calibrated: that needs a --validation-split above 0.\n" in demo.out
    assert "\r" not in demo.out and "\x1b" not in demo.out  # no terminal: no animation


def test_files(demo: Demo) -> None:
    folder = demo.path.parent
    names = {path.name for path in folder.iterdir()} - {Path(MODEL).name}
    pictures = {name for name in names if name.endswith(".png")}
    plots = "class_distribution confusion_matrix example_images learning_curves"
    assert pictures == {f"{plot}.png" for plot in [*plots.split(), "reliability"]}
    assert names - pictures == {"demo.h5", "history.csv", "metrics.json"}
    assert "Model, figures, plots: models\n" in demo.out
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
        assert "optimizer_weights" not in file
    assert stored == demo.metrics
    assert (stored["image_size"], stored["rescale"]) == (48, 1 / 255)
    assert stored["arguments"]["epochs"] == 15
    assert stored["images"] == {"train": 240, "test": 60}
    assert set(stored["versions"]) == {"python", "tensorflow", "keras", "numpy"}


def test_predict_and_evaluate_give_the_same_figures(demo: Demo, run: Callable) -> None:
    words = ["data/demo/test", "--model", demo.path]
    evaluated = run("predict.py", "--evaluate", *words)
    assert (evaluated.returncode, evaluated.stderr) == (0, "")
    assert evaluated.stdout.count("\nTest accuracy ") == 1  # no image is in train, too
    assert evaluated.stdout in demo.out
    predicted = run("predict.py", "--image", *words)
    assert (predicted.returncode, predicted.stderr) == (0, "")
    answers = re.findall(r"(\w+)/\d+\.png: (\w+) \(", predicted.stdout)
    right = [emotion == answer.lower() for emotion, answer in answers]
    assert len(right) == 60
    assert np.mean(right) == demo.metrics["test"]["accuracy"]


def test_the_command_that_train_suggests_runs(demo: Demo, run: Callable) -> None:
    suggestion = demo.out.splitlines()[-1]
    assert suggestion.startswith("Now try: python predict.py --image ")
    command = suggestion.removeprefix("Now try: python ")
    assert run(*shlex.split(command)).returncode == 0
