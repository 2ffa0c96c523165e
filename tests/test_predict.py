"""python predict.py says what is wrong at once, before TensorFlow is imported."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT

FACE = "data/demo/test/surprise/02.png"


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
        (["--image", tmp_path], f"{tmp_path}: no picture in this folder"),
        (
            ["--image", FACE, "--model", model],
            f"{model}: no model file there; make one with: python train.py",
        ),
    ]:
        result = run_without_tensorflow(*options)
        assert (result.returncode, result.stdout) == (1, "")
        assert result.stderr == f"predict.py: error: {message}\n"


def test_from_another_folder(tmp_path: Path) -> None:
    code = "import predict, train; print(predict.find_emotions('f.png')[0]['status'])"
    code += "; print(train.parse_args([]).data_dir, train.parse_args([]).model_path)"
    (tmp_path / "f.png").write_bytes((ROOT / FACE).read_bytes())
    for words in ([ROOT / "predict.py", "--image", "f.png"], ["-c", code]):
        result = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        assert (result.returncode, result.stderr) == (0, "")
    model = ROOT / "models" / "face_classification_model.h5"
    assert result.stdout == f"ok\n{ROOT / 'data'} {model}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
