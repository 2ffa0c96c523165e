"""python train.py with what users bring: mixed data, wrong usage, bad places.

The reference is a count of the images that were drawn.
"""

import errno
import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import run_train
from PIL import Image

import train
import utils


def test_mixed_data_from_the_files_to_the_figures(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    folder, path = tree / "train" / "sad", tree.parent / "models" / "m.h5"
    with Image.open(folder / "00.png") as face:
        face.save(folder / "upper.JPG")
        face.save(folder / "face.webp")
        face.save(tree / "test" / "sad" / "known.bmp")
        face.save(tree / "test" / "sad" / "known again.png")
    for number in range(7):
        (folder / f"file{number}").write_text("no image")
    (tree / "train" / "disgust").mkdir()
    fit = Mock(wraps=train.fit)
    monkeypatch.setattr(train, "fit", fit)
    names = ["sad", "angry", "happy"]
    options = ["--epochs", 1, "--validation-split", 0.25, "--classes", *names]
    run_train(tree, path, *options)

    out = capsys.readouterr().out
    assert out.count("ignored, not among the classes: disgust\n") == 1
    assert out.count("not an image") == 5
    assert "ignored: 2 more in train\n" in out
    rows = [" ".join(line.split()) for line in out.splitlines() if line]
    first = rows.index("train test validation") + 1
    assert rows[first : first + 7] == [
        "sad 11 6 3",
        "angry 9 4 3",
        "happy 9 4 3",
        "all 29 14 9",
        "repeated 0 1 0",
        "also in train 0 2 0",
        "ignored 7 0 0",
    ]
    trained, validated = (set(part.table.path) for part in fit.call_args.args[:2])
    assert (len(trained), len(validated)) == (29, 9)
    assert trained.isdisjoint(validated)
    text = (path.parent / "metrics.json").read_text()
    metrics = json.loads(text)
    assert (metrics["test"]["images"], metrics["not_in_train"]["images"]) == (14, 12)
    assert np.sum(metrics["test"]["confusion_matrix"], axis=1).tolist() == [6, 4, 4]
    assert utils.load_model(path).class_names == names
    assert f"images: temperature {metrics['temperature']:.2f}.\n" in out
    assert str(tree.parent) not in text  # names of folders are nobody's business
    assert str(tree.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "--epochs 0",
        "--learning-rate nan",
        "--validation-split 1",
        "--filters 1 1 1 1 1 1",
        "--classes happy",
        "--model-path model.keras",
        "--seed -1",
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


def test_where_it_writes_is_checked_before_training(tree: Path) -> None:
    place = tree.parent / "models"
    place.touch()  # a file where a folder should be
    with pytest.raises(SystemExit, match=rf"^train\.py: error: .* exists: '{place}'$"):
        run_train(tree, place / "m.h5")


def test_nobody_reads_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    monkeypatch.setattr(train, "index_data", Mock(side_effect=error))
    with pytest.raises(SystemExit, match=r"^train\.py: error: .*Broken pipe$"):
        train.main(["--model-path", str(tmp_path / "m.h5")])
