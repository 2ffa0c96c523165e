"""python predict.py as users run it: exact output, exit codes, no needless import.

The probabilities that it prints are compared with those of the model itself.
"""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import EMOTIONS, ROOT

import predict
import utils

FACE = "data/demo/test/surprise/02.png"


@pytest.fixture(scope="session")
def expected(demo: dict) -> np.ndarray:
    """Return the probabilities of FACE, the mean of all views."""
    model, _ = utils.load_model(demo["path"])
    return utils.predict_faces(model, utils.read_face(ROOT / FACE)[np.newaxis])[0]


def test_one_image(demo: dict, run: Callable, expected: np.ndarray) -> None:
    result = run("predict.py", "--image", FACE, "--model", demo["path"])
    percent = {EMOTIONS[i].capitalize(): 100 * p for i, p in enumerate(expected)}
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
    with pytest.raises(SystemExit) as stop:
        predict.main(["--model", str(demo["path"]), "--image", *images])
    out, err = capsys.readouterr()
    best = expected.argmax()
    answer = f"{EMOTIONS[best].capitalize()} ({100 * expected[best]:.1f} %)"
    paths = [ROOT / FACE, tmp_path / "b.png", tmp_path / "deep" / "a.PNG"]
    assert stop.value.code == 1
    assert out == "".join(f"{path}: {answer}\n" for path in paths)
    assert err.startswith(f"predict.py: error: {tmp_path / 'a.jpg'}: ")
    assert err.count("\n") == 1


def run_without_tensorflow(*options: str | Path) -> subprocess.CompletedProcess:
    """Run predict.py where importing TensorFlow or Keras fails."""
    code = (
        "import sys, runpy\n"
        "sys.modules['tensorflow'] = sys.modules['keras'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path('predict.py', run_name='__main__')"
    )
    words = [sys.executable, "-c", code, "predict.py", *map(str, options)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True)


def test_help_needs_no_tensorflow() -> None:
    result = run_without_tensorflow("--help")
    assert result.returncode == 0
    text = " ".join(result.stdout.split())
    assert "(default: models/face_classification_model.h5)" in text


def test_wrong_usage_needs_no_tensorflow() -> None:
    for options in ([], ["--image"], ["--image", FACE, "--nonsense"]):
        result = run_without_tensorflow(*options)
        assert (result.returncode, result.stdout) == (2, "")


def test_what_is_missing_needs_no_tensorflow(tmp_path: Path) -> None:
    image, model = tmp_path / "image.jpg", tmp_path / "model.h5"
    for options, message in [
        (["--image", image], f"{image}: no such file or folder"),
        (["--image", tmp_path], f"{tmp_path}: no file in this folder"),
        (
            ["--image", FACE, "--model", model],
            f"{model}: no model file there; train one with: python train.py",
        ),
    ]:
        result = run_without_tensorflow(*options)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"predict.py: error: {message}\n"


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
    with pytest.raises(SystemExit) as stop:
        predict.main([*words, str(folder)])
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert err == f"predict.py: error: {broken}: empty file\n"
    assert "(60 images, all;" in out
    assert "not also in train" not in out  # no train/ beside it: nobody knows
    with pytest.raises(SystemExit, match=rf"{tmp_path}/none: no such folder"):
        predict.main([*words, str(tmp_path / "none")])
    with pytest.raises(SystemExit, match=r"no folder angry, .*instead: mine"):
        predict.main([*words, str(tmp_path)])
