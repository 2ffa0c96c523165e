"""A training that was stopped anywhere goes on as if it had not been.

The reference is the same training left alone: same weights, same history.
"""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import (
    CLASSES,
    LINUX,
    UNIX,
    assert_same_arrays,
    file_size_limit,
    make_tree,
    run_train,
    small_model,
)

import train
import utils
from utils import UserError


def assert_same_training(folder: Path, other: Path) -> None:
    """Compare the model files and histories of two folders."""
    first, second = (utils.load_model(place / "m.h5") for place in (folder, other))
    assert_same_arrays(first.weights, second.weights)
    assert (folder / "history.csv").read_text() == (other / "history.csv").read_text()


def main(folder: Path, *options: object) -> None:
    """Train a small network for four epochs on the images beside a folder."""
    model_path = folder / "m.h5"
    run_train(folder.parent / "faces", model_path, "--epochs", 4, *options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_figures: None) -> Path:
    """Train on faces/ once in whole/, and once in stopped/ to the second epoch."""
    folder = tmp_path_factory.mktemp("trained")
    make_tree(folder / "faces", CLASSES)
    main(folder / "whole")
    on_epoch_end = train.Checkpoint.on_epoch_end

    def stop(self: train.Checkpoint, epoch: int, logs: dict) -> None:
        on_epoch_end(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(train.Checkpoint, "on_epoch_end", stop)
        main(folder / "stopped")
    assert error.value.code == 130
    return folder


@pytest.fixture
def stopped(trained: Path, tmp_path: Path) -> Path:
    """Copy all three for a test of its own; return stopped/."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True) / "stopped"


@pytest.fixture
def new(tree: Path) -> Path:
    """Return a folder beside faces/ that is not there yet."""
    return tree.parent / "new"


def test_a_checkpoint_is_never_discarded_silently(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped / "m.checkpoint.npz"
    before = checkpoint.read_bytes()
    for words, line in {
        "": r"m\.checkpoint\.npz: an unf.*--resume.*--restart",
        "--resume --seed 2 --epochs 5": "epochs 4, not 5; seed 1, not 2",
        "--resume --filters 4": r"filters \[4, 8\], not \[4\]\. .*--restart",
        "--resume --validation-split 0.25": (
            r"_split 0\.0, not 0\.25; images \w+, not \w+\."
        ),
    }.items():
        with pytest.raises(SystemExit, match=line):
            main(stopped, *words.split())
    faces = stopped.parent / "faces" / "train"
    (faces / "sad" / "00.png").rename(faces / "angry" / "99.png")
    with pytest.raises(SystemExit, match=r"has images \w+, not"):
        main(stopped, "--resume")
    assert checkpoint.read_bytes() == before
    assert [path.name for path in stopped.iterdir()] == [checkpoint.name]

    fit, fits = train.fit, []
    monkeypatch.setattr(train, "fit", lambda *a: fits.append(fit(*a)) or fits[0])
    main(stopped, "--restart")
    assert len(fits[0][1]) == 4
    assert not checkpoint.exists()


def test_nothing_to_resume(new: Path) -> None:
    with pytest.raises(SystemExit, match=r"m\.checkpoint\.npz.*to resume"):
        main(new, "--resume")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", "half", "pickle"])
def test_a_broken_checkpoint_is_named(stopped: Path, content: bytes | str) -> None:
    checkpoint = stopped / "m.checkpoint.npz"
    if content == "half":
        content = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    if content == "pickle":
        np.savez(checkpoint, about=np.array([{}], object))
    else:
        checkpoint.write_bytes(content)
    with pytest.raises(SystemExit, match=r"not a checkpoint: .*--restart") as error:
        main(stopped, "--resume")
    assert "\n" not in str(error.value)


def test_an_edited_network_is_named(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = train.network_shape
    monkeypatch.setattr(train, "network_shape", lambda args: (*shape(args)[:3], 6))
    with pytest.raises(SystemExit, match="another network"):
        main(stopped, "--resume")


def test_a_network_that_could_not_be_loaded_is_not_trained(
    new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(shape: tuple, num_classes: int, *_: object) -> keras.Model:
        layers = keras.layers
        middle = [layers.Flatten(), layers.UnitNormalization()]
        end = layers.Dense(num_classes, activation="softmax")
        return keras.Sequential([keras.Input(shape), *middle, end])

    monkeypatch.setattr(train, "build_model", edited)
    line = r"build_model: .*UnitNormalization, not one of utils\.L"
    with pytest.raises(SystemExit, match=line):
        main(new)


def test_stopped_while_the_model_is_saved(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = stopped / "m.h5", stopped.with_name("whole")
    shutil.copy(whole / "m.h5", model)
    with h5py.File(model, "r+") as file:
        file.attrs["seed"] = "99"
    old = model.read_bytes()

    stop = Mock(side_effect=KeyboardInterrupt(signal.SIGTERM))
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(utils, "evaluate", stop)
        main(stopped, "--resume")
    assert error.value.code == 143
    assert model.read_bytes() == old
    assert {path.name for path in stopped.iterdir()} == {"m.h5", "m.checkpoint.npz"}

    main(stopped, "--resume")
    assert (stopped / "m.previous.h5").read_bytes() == old
    assert_same_training(stopped, whole)
    history = pd.read_csv(stopped / "history.csv", index_col="epoch")
    assert list(history.index) == [1, 2, 3, 4]


@pytest.fixture
def checkpoint(tmp_path: Path) -> train.Checkpoint:
    """Return a checkpoint that was written after one epoch."""
    model = small_model()
    train.compile_model(model, 0.5, 10)
    checkpoint = train.Checkpoint(tmp_path / "m.checkpoint.npz", {"learning_rate": 0.5})
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})
    return checkpoint


@pytest.mark.parametrize("name", ["loss", "val_loss"])
def test_no_broken_weights_are_kept(checkpoint: train.Checkpoint, name: str) -> None:
    good = checkpoint.path.read_bytes()
    broken = {"loss": 1.0, "val_loss": 2.0} | {name: float("nan")}
    line = r"epoch 2: .*--restart .*--learning-rate \(0\.5\)"
    with pytest.raises(UserError, match=line):
        checkpoint.on_epoch_end(1, broken)
    assert checkpoint.path.read_bytes() == good
    again = train.Checkpoint(checkpoint.path, checkpoint.settings)
    again.load()
    assert again.history == [{"loss": 1.0, "val_loss": 2.0}]


@UNIX
def test_a_full_disk_at_the_checkpoint(checkpoint: train.Checkpoint) -> None:
    good = checkpoint.path.read_bytes()
    for limit in (0, 100, len(good) // 2, len(good) - 1):
        with file_size_limit(limit), pytest.raises(OSError, match="too large"):
            checkpoint.on_epoch_end(1, {"loss": 1.0})
        assert checkpoint.path.read_bytes() == good
        assert list(checkpoint.path.parent.iterdir()) == [checkpoint.path]


@UNIX
@pytest.mark.parametrize("checked", [True, False])
def test_a_full_disk_at_the_model(
    stopped: Path,
    checked: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    if not checked:  # the disk becomes full while the network is trained
        monkeypatch.setattr(train, "check_saving", lambda *_: None)
    model, checkpoint = stopped / "m.h5", stopped / "m.checkpoint.npz"
    model.write_bytes(b"old")
    before = checkpoint.read_bytes()
    line = r"cannot write there: .*too large"
    with file_size_limit(106 * 10**4), pytest.raises(SystemExit, match=line) as error:
        main(stopped, "--resume")
    assert str(error.value).count("\n") == 0
    assert capfd.readouterr().err == ""
    assert model.read_bytes() == b"old"
    assert {path.name for path in stopped.iterdir()} == {model.name, checkpoint.name}
    if checked:  # found before the training goes on
        assert checkpoint.read_bytes() == before
    else:
        with np.load(checkpoint) as file:
            assert len(json.loads(str(file["about"]))["history"]) == 4


def test_killed_before_the_checkpoint_is_deleted(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, checkpoint = stopped / "m.h5", stopped / "m.checkpoint.npz"
    model.write_bytes(b"old")
    unlink = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self == checkpoint:
            raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "unlink", die)
        keras.backend.clear_session()  # layers named as in a new process
        main(stopped, "--resume")
    done = model.read_bytes()
    keras.backend.clear_session()
    main(stopped, "--resume")
    assert model.read_bytes() == done
    assert (stopped / "m.previous.h5").read_bytes() == b"old"
    assert_same_training(stopped, stopped.with_name("whole"))


def test_only_one_training_at_a_model_path(tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    with train.lock_model(path), train.lock_model(tmp_path / "other.h5"):
        # Another process, since the lock belongs to one.
        words = [sys.executable, train.__file__, "--model-path", path]
        result = subprocess.run(words, capture_output=True, text=True)
        with pytest.raises(SystemExit, match="another training is writing it"):
            train.main(["--model-path", str(path)])
    line = f"train.py: error: {path}: another training is writing it\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)
    assert not list(tmp_path.iterdir())
    (tmp_path / "m.lock").touch()  # of a process that was killed: means nothing
    with train.lock_model(path):
        pass


@LINUX
def test_where_open_files_cannot_be_deleted(
    new: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def refuse_open(call: Callable) -> Callable:
        """Let a call fail with open files, as Windows does."""

        def refuse(*paths: str | Path, **options: object) -> None:
            for number in os.listdir("/proc/self/fd"):
                with contextlib.suppress(FileNotFoundError):  # that of listdir itself
                    opened = os.readlink(f"/proc/self/fd/{number}")
                    if opened in map(os.path.realpath, paths):
                        refused.append(Path(opened).name)
                        raise PermissionError(errno.EACCES, "Permission denied", opened)
            call(*paths, **options)

        return refuse

    monkeypatch.setattr(os, "unlink", refuse_open(os.unlink))
    monkeypatch.setattr(os, "replace", refuse_open(os.replace))
    for _ in range(2):  # what is left keeps nobody off
        main(new, "--epochs", 1)
    assert refused == ["m.lock", "m.lock"]
    assert (new / "m.h5").exists()


def test_out_of_memory(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    error = tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")
    fail = Mock(side_effect=error)
    before = (stopped / "m.checkpoint.npz").read_bytes()
    monkeypatch.setattr(train.Checkpoint, "on_epoch_end", fail)
    with pytest.raises(SystemExit, match=r"out of memory: lower --batch-size \(128\)"):
        main(stopped, "--resume")
    assert (stopped / "m.checkpoint.npz").read_bytes() == before


def test_a_bug_shows_its_traceback(
    stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "evaluate", Mock(side_effect=KeyError("bug")))
    with pytest.raises(KeyError, match="bug"):
        main(stopped, "--resume")
    assert (stopped / "m.checkpoint.npz").exists()
