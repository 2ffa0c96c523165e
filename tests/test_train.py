"""python train.py with what users bring: other folders, faults, wrong usage."""

import errno
import json
import re
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import run_train
from PIL import Image

import train
import utils


def run_main(tree: Path, *options: str) -> Path:
    """Train a small network for an epoch; return the model's folder."""
    path = tree.parent / "models" / "small.h5"
    run_train(tree, path, "--epochs", 1, *options)
    return path.parent


def test_a_tree_with_every_fault_trains(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tree / "train" / "sad"
    face = (folder / "00.png").read_bytes()
    with Image.open(folder / "01.png") as image:
        for name in ("upper.PNG", "upper.JPG", "face.bmp", "face.webp"):
            image.save(folder / name)
    bad = {"truncated.png": face[:700], "empty.jpg": b"", "text.txt": b"text"}
    never_read = {"Thumbs.db": b"", ".hidden.png": b""}
    for name, content in (bad | never_read).items():
        (folder / name).write_bytes(content)
    for part in ("train", "test"):
        (tree / part / "disgust").mkdir()
        (tree / part / "disgust" / "00.png").write_bytes(face)
    (tree / "test" / "sad" / "leak.png").write_bytes(face)
    metrics = json.loads((run_main(tree) / "metrics.json").read_text())
    out = capsys.readouterr().out
    assert metrics["images"] == {"train": 36 + 4, "test": 13}
    assert (metrics["test"]["images"], metrics["leak_free"]["images"]) == (13, 12)
    assert "ignored, not among the classes: disgust\n" in out
    assert out.count("disgust") == 1
    ignored = re.findall(r"^ignored: (\S+): .+$", out, re.MULTILINE)
    assert ignored == [str(folder / name) for name in sorted(bad)]
    assert re.search(r"^ignored +3 +0$", out, re.MULTILINE)


@pytest.mark.parametrize(("split", "source"), [("0", "test"), ("0.25", "train")])
def test_what_a_training_is_validated_on(
    tree: Path, monkeypatch: pytest.MonkeyPatch, split: str, source: str
) -> None:
    fit = Mock(side_effect=utils.UserError("enough"))
    monkeypatch.setattr(train, "fit", fit)
    with pytest.raises(SystemExit, match="enough"):
        run_main(tree, "--validation-split", split)
    trained, validated = (set(part.table.path) for part in fit.call_args.args[:2])
    assert {Path(path).parts[-3] for path in trained} == {"train"}
    assert {Path(path).parts[-3] for path in validated} == {source}
    assert trained.isdisjoint(validated)


def test_validation_part_end_to_end(tree: Path) -> None:
    folder = run_main(tree, "--validation-split", "0.25")
    text = (folder / "metrics.json").read_text()
    metrics = json.loads(text)
    assert metrics["images"] == {"train": 27, "validation": 9, "test": 12}
    assert metrics["temperature"] > 0
    # No path is written.
    assert str(tree.parent) not in text
    assert str(tree.parent).encode() not in (folder / "small.h5").read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "--epochs 0",
        "--epochs many",
        "--batch-size -1",
        "--learning-rate nan",
        "--validation-split 1",
        "--filters 1 1 1 1 1 1",
        "--classes happy",
        "--model-path model.keras",
        "--model-path model.weights.h5",
        "--seed -1",
        "--resume --restart",
        "--precision int8",
        "--no-such-option",
    ],
)
def test_wrong_usage_exits_with_2(options: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(options.split(" "))
    assert stop.value.code == 2
    assert options.split()[0] in capsys.readouterr().err


def test_no_input_is_overwritten(tree: Path, tmp_path: Path) -> None:
    table, old = tmp_path / "history.csv", tmp_path / "m.previous.h5"
    table.touch()
    old.touch()
    line = "would be overwritten; name another --model-path"
    for words in (["--data-dir", table], ["--data-dir", tree, "--fine-tune", old]):
        with pytest.raises(SystemExit, match=f"{words[-1]}: {line}"):
            train.main([*map(str, words), "--model-path", str(tmp_path / "m.h5")])
    path = tree / "train" / "sad" / "m.h5"
    with pytest.raises(SystemExit, match=f"{path}: is in a folder of images"):
        run_train(tree, path)


def test_a_closed_stdout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(train, "index_data", Mock(side_effect=error))
    with pytest.raises(SystemExit, match=r"^train.py: error: .*Broken pipe$"):
        train.main(["--model-path", str(tmp_path / "m.h5")])


def test_expected_failures_exit_with_1(tree: Path, run: Callable) -> None:
    result = run("train.py", "--data-dir", tree)  # three of six classes
    assert result.returncode == 1
    assert result.stderr == (
        f"train.py: error: {tree}/train: no folder fear, neutral, surprise; "
        "found instead: angry, happy, sad; "
        "to train on these: --classes angry happy sad\n"
    )


def test_where_it_writes_is_checked_before_training(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(train, "fit", None)
    place = tree.parent / "models"
    place.touch()  # a file where a folder should be
    with pytest.raises(SystemExit, match=rf"^train\.py: error: {place}: cannot write"):
        run_main(tree)
    place.unlink()
    (place / "small.h5").mkdir(parents=True)
    with pytest.raises(SystemExit) as stop:
        run_main(tree)
    assert stop.value.code == 2
    assert "small.h5 is a folder" in capsys.readouterr().err


def test_other_classes_in_their_order(
    tree: Path, recwarn: pytest.WarningsRecorder
) -> None:
    for part in ("train", "test"):  # names that look like formulas, or no font has
        (tree / part / "sad").rename(tree / part / r"s$\a$d")
        (tree / part / "happy").rename(tree / part / "喜び")
    names = [r"s$\a$d", "喜び", "angry"]
    folder = run_main(tree, "--classes", *names)
    assert (folder / "confusion_matrix.png").is_file()
    assert not [w for w in recwarn if "Glyph" in str(w.message)]
    assert utils.load_model(folder / "small.h5").class_names == names


def test_help(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for option in vars(train.parse_args([])):
        assert f"--{option.replace('_', '-')}" in out
    assert "(default: 10)" in out
