"""python predict.py says what is wrong at once, before TensorFlow is imported."""

import subprocess
import sys
from pathlib import Path

from conftest import CROP, MODEL, ROOT

WITHOUT_TENSORFLOW = """
import sys, runpy
sys.modules["tensorflow"] = sys.modules["keras"] = None
sys.argv = ["predict.py", *sys.argv[1:]]
runpy.run_path("predict.py", run_name="__main__")
"""


def python(folder: Path, *words: str | Path) -> subprocess.CompletedProcess:
    """Run Python in a folder, where it finds this project's modules."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )


def test_help_needs_no_tensorflow() -> None:
    result = python(ROOT, "-c", WITHOUT_TENSORFLOW, "--help")
    assert result.returncode == 0
    assert f"(default: {MODEL})" in " ".join(result.stdout.split())


def test_errors_need_no_tensorflow(tmp_path: Path) -> None:
    image, model = tmp_path / "image.jpg", tmp_path / "model.h5"
    for options, code, line in (
        ([], 2, "one of the arguments --image --evaluate is required"),
        (["--image", image], 1, f"{image}: no such file or folder"),
        (["--image", tmp_path], 1, f"{tmp_path}: no picture in this folder"),
        (
            ["--image", CROP, "--model", model],
            1,
            f"{model}: no model file there; make one with: python train.py",
        ),
    ):
        result = python(ROOT, "-c", WITHOUT_TENSORFLOW, *options)
        assert (result.returncode, result.stdout) == (code, "")
        usage, begin, told = result.stderr.partition("predict.py: error: ")
        assert (begin, told) == ("predict.py: error: ", f"{line}\n")
        assert bool(usage) == (code == 2)


def test_from_another_folder(tmp_path: Path) -> None:
    code = "import predict, train; print(predict.find_emotions('f.png')[0]['status'])"
    code += "; print(train.parse_args([]).data_dir, train.parse_args([]).model_path)"
    (tmp_path / "f.png").write_bytes(CROP.read_bytes())
    for words in ([ROOT / "predict.py", "--image", "f.png"], ["-c", code]):
        result = python(tmp_path, *words)
        assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"ok\n{ROOT / 'data'} {ROOT / MODEL}\n"
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
