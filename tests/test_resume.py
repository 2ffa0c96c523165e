"""A training that was stopped anywhere goes on as if it had not been.

The reference is the same training left alone: same weights, same history.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from conftest import make_tree

import train
import utils
from utils import UserError

WORDS = ["--epochs", "4", "--filters", "4", "8", "--dense-units", "8"]
SMALL = ["--classes", "angry", "happy", "sad"]


def weights(path: Path) -> list[np.ndarray]:
    """Read a model file's weights."""
    return utils.load_model(path)[0].get_weights()


def assert_same_training(folder: Path, other: Path) -> None:
    """Compare the model files and histories of two folders."""
    pairs = zip(weights(folder / "m.h5"), weights(other / "m.h5"), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    assert (folder / "history.csv").read_text() == (other / "history.csv").read_text()


def stop_in_epoch(
    checkout: Path, command: list[str], epoch: int, number: int
) -> subprocess.CompletedProcess:
    """Run a command as a process, and send it a signal once an epoch has begun."""
    process = subprocess.Popen(
        [sys.executable, *command],
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Jobs in the background of a shell are begun with Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    out = ""
    for line in process.stdout:
        out += line
        if line.startswith(f"Epoch {epoch}/"):
            process.send_signal(number)
    return subprocess.CompletedProcess(
        command, process.wait(), out, process.stderr.read()
    )


def test_real_processes_are_stopped_and_go_on(checkout: Path, tmp_path: Path) -> None:
    data = ["--data-dir", "data/demo", "--model-path"]
    words = ["train.py", *WORDS, *data, str(tmp_path / "a b" / "m.h5")]
    checkpoint = tmp_path / "a b" / "m.checkpoint.npz"
    command = ["python", *words, "--resume"]

    result = stop_in_epoch(checkout, words, 2, signal.SIGINT)
    assert result.returncode == 130
    line = "train.py: stopped; {} of 4 epochs are kept in {}. Go on with: {}\n"
    assert result.stderr == line.format(1, checkpoint, shlex.join(command))
    command = shlex.split(result.stderr.split("Go on with: python ")[1])

    result = stop_in_epoch(checkout, command, 3, signal.SIGTERM)
    assert result.returncode == 143
    assert result.stdout.count("Resumed after epoch 1 of 4.\n") == 1
    assert result.stderr == line.format(2, checkpoint, shlex.join(["python", *command]))

    result = stop_in_epoch(checkout, command, 4, signal.SIGKILL)
    assert result.returncode == -9
    result = stop_in_epoch(checkout, command, 0, signal.SIGKILL)
    assert (result.returncode, result.stderr) == (0, "")
    assert re.findall(r"^Epoch \d+", result.stdout, re.MULTILINE) == ["Epoch 4"]
    assert not checkpoint.exists()

    folder = checkout / "data" / "demo"
    whole = ["--data-dir", str(folder), "--model-path", str(tmp_path / "m.h5")]
    train.main([*WORDS, *whole])
    assert_same_training(tmp_path / "a b", tmp_path)


def main(folder: Path, tree: Path, *options: str) -> None:
    """Train a small network on a tree, in this process."""
    words = [*WORDS, *SMALL, "--data-dir", str(tree), "--model-path"]
    train.main([*words, str(folder / "m.h5"), *options])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
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
    with pytest.raises(SystemExit, match=r"m\.checkpoint\.npz.*--resume.*--restart"):
        main(stopped, tree)
    with pytest.raises(SystemExit, match="--epochs 4, not 5; --seed 1, not 2"):
        main(stopped, tree, "--resume", "--seed", "2", "--epochs", "5")
    with pytest.raises(
        SystemExit, match=r"--filters \[4, 8\], not \[4\]\. .*--restart"
    ):
        main(stopped, tree, "--resume", "--filters", "4")
    with pytest.raises(SystemExit, match=r"-split 0\.0, not 0\.25; other im"):
        main(stopped, tree, "--resume", "--validation-split", "0.25")
    picture = tree / "train" / "sad" / "00.png"
    picture.rename(tree / "train" / "angry" / "99.png")
    with pytest.raises(SystemExit, match="other images"):
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
    assert train.describe_stop(stopped / "m.h5", []).endswith("nothing is kept")


def test_an_edited_network_is_named(
    stopped: Path, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build = train.build_model

    def wider(
        shape: tuple, classes: int, filters: list, dense_units: int, **options: float
    ) -> object:
        return build(shape, classes, filters, dense_units + 1, **options)

    monkeypatch.setattr(train, "build_model", wider)
    with pytest.raises(SystemExit, match="another network"):
        main(stopped, tree, "--resume")


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
    checkpoint = train.Checkpoint(path, {"learning_rate": 0.5, "epochs": 9})
    model = train.build_model((48, 48, 1), 3, [4], 4)
    train.compile_model(model, 0.5, 10, 0.9)
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {"loss": 1.0, "val_loss": 2.0})
    good = path.read_bytes()
    with pytest.raises(
        UserError, match=r"epoch 2.* --learning-rate \(0\.5\).*--restart"
    ):
        checkpoint.on_epoch_end(
            1, {"loss": 1.0, "val_loss": 2.0} | {name: float("nan")}
        )
    assert path.read_bytes() == good
    about, _ = train.read_checkpoint(path)
    assert about["history"] == [{"loss": 1.0, "val_loss": 2.0}]


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.checkpoint.npz"
    checkpoint = train.Checkpoint(path, {"epochs": 9})
    model = train.build_model((48, 48, 1), 3, [4], 4)
    train.compile_model(model, 0.5, 10, 0.9)
    checkpoint.set_model(model)
    checkpoint.on_epoch_end(0, {"loss": 1.0})
    good = path.read_bytes()

    def savez(path: Path, **arrays: np.ndarray) -> None:
        path.write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", savez)
    with pytest.raises(UserError, match="No space left on device"):
        checkpoint.on_epoch_end(1, {"loss": 1.0})
    assert path.read_bytes() == good
    assert list(tmp_path.iterdir()) == [path]
