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
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
import tensorflow as tf
from conftest import LINUX, UNIX, file_size_limit, make_tree

import train
import utils
from utils import UserError

WORDS = ["--epochs", "4", "--filters", "4", "8", "--dense-units", "8"]
SMALL = ["--classes", "angry", "happy", "sad"]


def weights(path: Path) -> list[np.ndarray]:
    """Read a model file's weights."""
    return utils.load_model(path).weights


def assert_same_training(folder: Path, other: Path) -> None:
    """Compare the model files and histories of two folders."""
    pairs = zip(weights(folder / "m.h5"), weights(other / "m.h5"), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    assert (folder / "history.csv").read_text() == (other / "history.csv").read_text()


def main(folder: Path, tree: Path, *options: str) -> None:
    """Train a small network on a tree, in this process."""
    words = [*WORDS, *SMALL, "--data-dir", str(tree), "--model-path"]
    train.main([*words, str(folder / "m.h5"), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, empty_figures: None) -> Path:
    """Train on faces/ once in whole/, and once in stopped/ to the second epoch."""
    folder = tmp_path_factory.mktemp("trained")
    tree = make_tree(folder / "faces", SMALL[1:])
    main(folder / "whole", tree)
    on_epoch_end = train.Checkpoint.on_epoch_end

    def stop(self: train.Checkpoint, epoch: int, logs: dict) -> None:
        on_epoch_end(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(train.Checkpoint, "on_epoch_end", stop)
        main(folder / "stopped", tree)
    assert error.value.code == 130
    return folder


@pytest.fixture
def copies(trained: Path, tmp_path: Path) -> Path:
    """Copy faces/, whole/ and stopped/ for a test of its own."""
    return shutil.copytree(trained, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def tree(copies: Path) -> Path:
    """Return the folder of the images."""
    return copies / "faces"


@pytest.fixture
def stopped(copies: Path) -> Path:
    """Return the folder of the training that was stopped after two of four epochs."""
    return copies / "stopped"


def test_a_checkpoint_is_never_thrown_away_silently(
    stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = stopped / "m.checkpoint.npz"
    before = checkpoint.read_bytes()
    with pytest.raises(
        SystemExit, match=r"m\.checkpoint\.npz: an unf.*--resume.*--restart"
    ):
        main(stopped, tree)
    with pytest.raises(SystemExit, match="epochs 4, not 5; seed 1, not 2"):
        main(stopped, tree, "--resume", "--seed", "2", "--epochs", "5")
    with pytest.raises(SystemExit, match=r"filters \[4, 8\], not \[4\]\. .*--restart"):
        main(stopped, tree, "--resume", "--filters", "4")
    with pytest.raises(
        SystemExit, match=r"_split 0\.0, not 0\.25; images \w+, not \w+\."
    ):
        main(stopped, tree, "--resume", "--validation-split", "0.25")
    picture = tree / "train" / "sad" / "00.png"
    picture.rename(tree / "train" / "angry" / "99.png")
    with pytest.raises(SystemExit, match=r"begun with images \w+, not"):
        main(stopped, tree, "--resume")
    assert checkpoint.read_bytes() == before
    assert [path.name for path in stopped.iterdir()] == [checkpoint.name]

    fit, fits = train.fit, []
    monkeypatch.setattr(train, "fit", lambda *a: fits.append(fit(*a)) or fits[0])
    main(stopped, tree, "--restart")
    assert len(fits[0][1]) == 4
    assert not checkpoint.exists()


def test_nothing_to_resume(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"m\.checkpoint\.npz.*to resume"):
        main(tmp_path, tree, "--resume")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04torn", "half", "pickle"])
def test_a_broken_checkpoint_is_named(
    stopped: Path, tree: Path, content: bytes | str
) -> None:
    checkpoint = stopped / "m.checkpoint.npz"
    if content == "half":
        content = checkpoint.read_bytes()[: checkpoint.stat().st_size // 2]
    if content == "pickle":
        np.savez(checkpoint, about=np.array([{}], object))
    else:
        checkpoint.write_bytes(content)
    with pytest.raises(SystemExit, match=r"not a checkpoint: .*--restart") as error:
        main(stopped, tree, "--resume")
    assert "\n" not in str(error.value)


def test_an_edited_network_is_named(
    stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = train.build_model

    def wider(
        shape: tuple, classes: int, filters: list, units: int, *training: object
    ) -> keras.Model:
        return build(shape, classes, filters, units + 1, *training)

    monkeypatch.setattr(train, "build_model", wider)
    with pytest.raises(SystemExit, match="another network"):
        main(stopped, tree, "--resume")


def test_a_network_that_could_not_be_loaded_is_not_trained(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(shape: tuple, num_classes: int, *_: object) -> keras.Model:
        layers = keras.layers
        middle = [layers.Flatten(), layers.UnitNormalization()]
        end = layers.Dense(num_classes, activation="softmax")
        return keras.Sequential([keras.Input(shape), *middle, end])

    monkeypatch.setattr(train, "build_model", edited)
    with pytest.raises(
        SystemExit, match=r"build_model: .*UnitNormalization, not one of utils\.L"
    ):
        main(tmp_path, tree)


def test_stopped_while_the_model_is_saved(
    copies: Path, stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stopped / "m.h5"
    shutil.copy(copies / "whole" / "m.h5", model)
    with h5py.File(model, "r+") as file:
        file.attrs["seed"] = "99"
    old = model.read_bytes()

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as error:
        patch.setattr(utils, "evaluate", stop)
        main(stopped, tree, "--resume")
    assert error.value.code == 143
    assert model.read_bytes() == old
    assert {path.name for path in stopped.iterdir()} == {"m.h5", "m.checkpoint.npz"}

    main(stopped, tree, "--resume")
    assert (stopped / "m.previous.h5").read_bytes() == old
    assert_same_training(stopped, copies / "whole")
    history = pd.read_csv(stopped / "history.csv", index_col="epoch")
    assert list(history.index) == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["loss", "val_loss"])
def test_no_broken_weights_are_kept(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.checkpoint.npz"
    settings = {"learning_rate": 0.5}
    checkpoint = train.Checkpoint(path, settings)
    model = train.build_model((48, 48, 1), 3, [4], 4)
    train.compile_model(model, 0.5, 10)
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})
    good = path.read_bytes()
    with pytest.raises(
        UserError, match=r"epoch 2: .*--restart .*--learning-rate \(0\.5\)"
    ):
        checkpoint.on_epoch_end(
            1, {"loss": 1.0, "val_loss": 2.0} | {name: float("nan")}
        )
    assert path.read_bytes() == good
    again = train.Checkpoint(path, settings)
    again.load()
    assert again.history == [{"loss": 1.0, "val_loss": 2.0}]


@UNIX
def test_a_full_disk_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "m.checkpoint.npz"
    checkpoint = train.Checkpoint(path, {"epochs": 9})
    model = train.build_model((48, 48, 1), 3, [4], 4)
    train.compile_model(model, 0.5, 10)
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {"loss": 1.0})
    good = path.read_bytes()
    for limit in (0, 100, len(good) // 2, len(good) - 1):
        with (
            file_size_limit(limit),
            pytest.raises(OSError, match="too large"),
        ):
            checkpoint.on_epoch_end(1, {"loss": 1.0})
        assert path.read_bytes() == good
        assert list(tmp_path.iterdir()) == [path]


@UNIX
@pytest.mark.parametrize("checked", [True, False])
@UNIX
def test_a_full_disk_at_the_model(
    stopped: Path,
    tree: Path,
    checked: bool,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    if not checked:  # the disk becomes full while the network is trained
        monkeypatch.setattr(train, "check_saving", lambda *_: None)
    model, checkpoint = stopped / "m.h5", stopped / "m.checkpoint.npz"
    model.write_bytes(b"old")
    before = checkpoint.read_bytes()
    with (
        file_size_limit(106 * 10**4),
        pytest.raises(SystemExit, match=r"cannot write there: .*too large") as error,
    ):
        main(stopped, tree, "--resume")
    assert str(error.value).count("\n") == 0
    assert capfd.readouterr().err == ""
    assert model.read_bytes() == b"old"
    assert {path.name for path in stopped.iterdir()} == {model.name, checkpoint.name}
    if checked:  # found before the training goes on
        assert checkpoint.read_bytes() == before
    else:
        with np.load(checkpoint) as file:
            assert len(json.loads(str(file["about"]))["history"]) == 4


def test_killed_when_all_but_the_checkpoint_is_done(
    copies: Path, stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
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
        main(stopped, tree, "--resume")
    done = model.read_bytes()
    keras.backend.clear_session()
    main(stopped, tree, "--resume")
    assert model.read_bytes() == done
    assert (stopped / "m.previous.h5").read_bytes() == b"old"
    assert_same_training(stopped, copies / "whole")


def test_only_one_training_at_a_model_path(tree: Path, tmp_path: Path) -> None:
    path = tmp_path / "m.h5"
    with train.claiming(path), train.claiming(tmp_path / "other.h5"):
        # Another process, since the lock belongs to one.
        words = [*WORDS, *SMALL, "--data-dir", str(tree), "--model-path", str(path)]
        result = subprocess.run(
            [sys.executable, train.__file__, *words], capture_output=True, text=True
        )
        with pytest.raises(SystemExit, match="another training is writing it"):
            train.main(words)
    line = f"train.py: error: {path}: another training is writing it\n"
    assert (result.returncode, result.stdout, result.stderr) == (1, "", line)
    assert not list(tmp_path.glob("m*"))
    (tmp_path / "m.lock").touch()  # of a process that was killed: means nothing
    with train.claiming(path):
        pass


@LINUX
def test_where_open_files_cannot_be_deleted(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused, unlink, replace = [], os.unlink, os.replace

    def refuse_open(*paths: str | Path) -> None:
        """Fail as Windows does."""
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of listdir itself
                opened = os.readlink(f"/proc/self/fd/{number}")
                if opened in [os.path.realpath(path) for path in paths]:
                    refused.append(Path(opened).name)
                    raise PermissionError(errno.EACCES, "Permission denied", opened)

    def checked_unlink(path: str | Path, **options: object) -> None:
        refuse_open(path)
        unlink(path, **options)

    def checked_replace(source: str | Path, target: str | Path) -> None:
        refuse_open(source, target)
        replace(source, target)

    monkeypatch.setattr(os, "unlink", checked_unlink)
    monkeypatch.setattr(os, "replace", checked_replace)
    for _ in range(2):  # what is left keeps nobody off
        main(tmp_path, tree, "--epochs", "1")
    assert refused == ["m.lock", "m.lock"]
    assert (tmp_path / "m.h5").exists()


def test_out_of_memory(
    stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object, *arguments: object) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating")

    before = (stopped / "m.checkpoint.npz").read_bytes()
    monkeypatch.setattr(train.Checkpoint, "on_epoch_end", fail)
    with pytest.raises(SystemExit, match=r"out of memory: lower --batch-size \(128\)"):
        main(stopped, tree, "--resume")
    assert (stopped / "m.checkpoint.npz").read_bytes() == before


def test_a_bug_shows_its_traceback(
    stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "calibrate", None)
    monkeypatch.setattr(utils, "evaluate", lambda *a: {}["bug"])
    with pytest.raises(KeyError, match="bug"):
        main(stopped, tree, "--resume")
    assert (stopped / "m.checkpoint.npz").exists()
