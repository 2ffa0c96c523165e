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


def python(folder: Path, *words: str | Path) -> tuple[int, str, str]:
    """Run Python in a folder, where it finds this project's modules."""
    result = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout, result.stderr


def test_help_and_errors_need_no_tensorflow(tmp_path: Path) -> None:
    code, out, _ = python(ROOT, "-c", WITHOUT_TENSORFLOW, "--help")
    assert code == 0 and f"(default: {MODEL})" in " ".join(out.split())
    usage = "one of the arguments --image --evaluate is required"
    model = tmp_path / "model.h5"
    missing = f"{model}: no model file there; make one with: python train.py"
    for words, code, line in (
        ([], 2, usage),
        (["--image", tmp_path], 1, f"{tmp_path}: no picture in this folder"),
        (["--image", CROP, "--model", model], 1, missing),
    ):
        *result, err = python(ROOT, "-c", WITHOUT_TENSORFLOW, *words)
        assert result == [code, ""]
        assert err.endswith(f"predict.py: error: {line}\n")
        assert err.startswith("usage: " if code == 2 else "predict.py: error: ")


def test_from_another_folder(tmp_path: Path) -> None:
    code = "import predict, train; print(predict.find_emotions('f.png')[0]['status'])"
    code += "; print(train.parse_args([]).data_dir, train.parse_args([]).model_path)"
    (tmp_path / "f.png").write_bytes(CROP.read_bytes())
    result = python(tmp_path, "-c", code)
    assert result == (0, f"ok\n{ROOT / 'data'} {ROOT / MODEL}\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["f.png"]
