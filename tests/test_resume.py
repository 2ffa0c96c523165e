"""A training that was stopped anywhere goes on as if it had not been.

The reference is the same training left alone: same weights, same history.
"""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import keras
import numpy as np
import pytest
from conftest import UNIX, assert_same_arrays, file_size_limit, run_train, small_model

import train
import utils
from utils import UserError


def main(folder: Path, *options: object) -> None:
    """Train a small network for four epochs on the images beside a folder."""
    keras.backend.clear_session()  # layers are named as in a new process
    run_train(folder.parent / "faces", folder / "m.h5", "--epochs", 4, *options)


@pytest.fixture
def stopped(tree: Path, monkeypatch: pytest.MonkeyPatch, empty_figures: None) -> Path:
    """Return the folder of a training that was stopped as its third epoch began."""
    stop = Mock(side_effect=[None, None, KeyboardInterrupt])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(train.Checkpoint, "on_epoch_begin", stop)
        main(tree.parent / "stopped")
    assert error.value.code == 130
    return tree.parent / "stopped"


def test_a_stopped_training_becomes_the_same_as_one_left_alone(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint = stopped / "m.h5", stopped / "m.checkpoint.npz"
    model.write_bytes(b"old")
    stop = Mock(side_effect=KeyboardInterrupt)

    # Stopped while the model is saved: the old model stays.
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(utils, "evaluate", stop)
        main(stopped, "--resume")
    assert model.read_bytes() == b"old"
    assert {path.name for path in stopped.iterdir()} == {model.name, checkpoint.name}

    # Stopped before the checkpoint is deleted: the old model stays the previous one.
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "propose_command", stop)
        main(stopped, "--resume")
    done = model.read_bytes()
    main(stopped, "--resume")
    assert model.read_bytes() == done
    assert (stopped / "m.previous.h5").read_bytes() == b"old"

    whole, set_epoch = stopped.with_name("whole"), train.FaceIterator.set_epoch
    epochs = Mock(side_effect=set_epoch)
    monkeypatch.setattr(train.FaceIterator, "set_epoch", lambda *a: epochs(*a))
    main(whole)
    # Each iterator begins at 0; then that of training has an order for every epoch.
    assert [call.args[1] for call in epochs.call_args_list] == [0, 0, 0, 1, 2, 3]
    networks = [utils.load_model(folder / "m.h5") for folder in (stopped, whole)]
    assert_same_arrays(networks[0].weights, networks[1].weights)
    history = (whole / "history.csv").read_text()
    assert (stopped / "history.csv").read_text() == history


def test_a_checkpoint_is_never_discarded_silently(stopped: Path) -> None:
    checkpoint = stopped / "m.checkpoint.npz"
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit, match=r"an unfinished .*--resume or .*--restart"):
        main(stopped)
    with pytest.raises(SystemExit, match=r"was begun with epochs 4, not 5; use"):
        main(stopped, "--resume", "--epochs", 5)
    faces = stopped.parent / "faces" / "train"
    (faces / "sad" / "00.png").rename(faces / "angry" / "99.png")
    with pytest.raises(SystemExit, match=r"was begun with images \d+, not \d+; use"):
        main(stopped, "--resume")
    assert checkpoint.read_bytes() == before
    main(stopped, "--restart", "--epochs", 1)
    assert (stopped / "m.h5").exists()
    assert not checkpoint.exists()


def test_a_broken_checkpoint_is_named_and_runs_no_code(tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    np.savez(path, about=np.array([{}], object))
    pickled = path.read_bytes()
    for content in (b"", pickled[:50], pickled):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"not a checkpoint; .*--restart$"):
            train.Checkpoint(path, small_model(), {}).load()


@UNIX
def test_only_a_whole_checkpoint_of_good_weights_replaces_the_last(
    tmp_path: Path,
) -> None:
    model, path = small_model(), tmp_path / "m.checkpoint.npz"
    train.compile_model(model, 0.5, 10)
    checkpoint = train.Checkpoint(path, model, {"learning_rate": 0.5})
    checkpoint.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})
    good = path.read_bytes()
    line = r"epoch 2: .*--restart .*--learning-rate below 0\.5"
    with pytest.raises(UserError, match=line):
        checkpoint.on_epoch_end(1, {"loss": 1.0, "val_loss": float("nan")})
    for limit in (100, len(good) - 1):  # of a full disk
        with file_size_limit(limit), pytest.raises(OSError, match="too large"):
            checkpoint.on_epoch_end(1, {"loss": 1.0, "val_loss": 2.0})
        assert path.read_bytes() == good
        assert list(tmp_path.iterdir()) == [path]


@UNIX
def test_a_full_disk_at_the_model(
    tree: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    # The disk becomes full while the network is trained.
    monkeypatch.setattr(train, "check_saving", lambda *_: None)
    folder = tree.parent / "new"
    folder.mkdir()
    (folder / "m.h5").write_bytes(b"old")
    line = rf"^train\.py: error: {folder / 'm.h5'}: .*too large$"
    with file_size_limit(106 * 10**4), pytest.raises(SystemExit, match=line):
        main(folder)
    assert capfd.readouterr().err == ""
    assert (folder / "m.h5").read_bytes() == b"old"
    assert {path.name for path in folder.iterdir()} == {"m.h5", "m.checkpoint.npz"}
    with np.load(folder / "m.checkpoint.npz") as file:
        assert len(json.loads(str(file["about"]))["history"]) == 4


def test_a_network_that_could_not_be_loaded_is_not_trained(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = keras.layers
    edited = [keras.Input((48, 48, 1)), layers.Flatten(), layers.UnitNormalization()]
    model = keras.Sequential([*edited, layers.Dense(3, activation="softmax")])
    monkeypatch.setattr(train, "build_model", lambda *_: model)
    with pytest.raises(SystemExit, match=r"build_model: .*UnitNormalization"):
        main(tree.parent / "new")


def test_only_one_training_at_a_model_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.h5"
    line = f"^train.py: error: {path}: another training is writing it$"
    with train.lock_model(path), pytest.raises(SystemExit, match=line):
        train.main(["--model-path", str(path)])
    assert not list(tmp_path.iterdir())
    # What a killed process leaves, or Windows does not delete, keeps nobody off.
    (tmp_path / "m.lock").touch()
    monkeypatch.setattr(os, "unlink", Mock(side_effect=PermissionError))
    with train.lock_model(path):
        pass
