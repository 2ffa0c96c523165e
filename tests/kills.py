"""Kill trainings at random moments, and look at what is left.

    python tests/kills.py --kills 30   # 15 minutes

Half of them are killed at any moment, half while they write a file. After each kill the
next process goes on, until a training is complete; then another begins. The script ends
at the first file that is torn, lost or doubled.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402

FORK = multiprocessing.get_context("fork")  # a child need not import TensorFlow first


def train_quietly(path: Path) -> None:
    """Begin a small training on the drawn faces, or go on with it."""
    words = ["--data-dir", str(ROOT / "data" / "demo"), "--model-path", str(path)]
    words += ["--epochs", "4", "--filters", "4", "8", "--dense-units", "8"]
    if train.checkpoint_path(path).exists():
        words.append("--resume")
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        train.main(words)
    os._exit(0)  # as train.leave does


def start(path: Path) -> multiprocessing.Process:
    """Start a training in a new process."""
    process = FORK.Process(target=train_quietly, args=[path], daemon=True)
    process.start()
    return process


def wait_for_files(process: multiprocessing.Process, folder: Path, count: int) -> None:
    """Wait until a process has begun to write so many files, or ends."""
    seen: set[tuple] = set()
    while len(seen) < count and process.is_alive():
        for path in folder.glob("*.new.*"):
            with contextlib.suppress(FileNotFoundError):
                seen.add((path.name, path.stat().st_ino))


def check(folder: Path, whole: Path, epochs: int) -> int | None:
    """Look at every file that a kill has left after so many epochs.

    Returns:
        The number of epochs in the checkpoint; None if the training was done.

    Raises:
        AssertionError: if a file is torn or lost, or an epoch is lost or doubled.
    """
    new = (whole / "m.h5").read_bytes()
    model = (folder / "m.h5").read_bytes()
    assert model in (new, new + b"\0"), "model file torn"
    if model == new:
        previous = (folder / "m.previous.h5").read_bytes()
        assert previous == new + b"\0", "previous model lost"
    history = folder / "history.csv"
    expected = (whole / "history.csv").read_text()
    assert not history.exists() or history.read_text() == expected
    checkpoint = train.checkpoint_path(folder / "m.h5")
    if not checkpoint.exists():
        assert model == new or epochs == 0, "checkpoint lost"
        return None if model == new else 0
    with np.load(checkpoint) as file:
        assert len([file[name] for name in file.files]) > 10, "checkpoint torn"
        done = [row["loss"] for row in json.loads(str(file["about"]))["history"]]
    losses = pd.read_csv(whole / "history.csv").loss
    np.testing.assert_allclose(done, losses[: len(done)], rtol=1e-6)
    assert len(done) >= epochs, "epochs lost"
    return len(done)


def kill_trainings(kills: int, folder: Path) -> None:
    """Kill trainings so many times, and print counts."""
    whole, killed = folder / "whole", folder / "killed"
    begin = time.monotonic()
    start(whole / "m.h5").join()
    length = time.monotonic() - begin
    counts = {"at any moment": 0, "while a file was written": 0}
    complete = epochs = 0
    while sum(counts.values()) < kills:
        if not killed.exists():  # a finished model, for a new training to replace
            killed.mkdir()
            (killed / "m.h5").write_bytes((whole / "m.h5").read_bytes() + b"\0")
        process, kind = start(killed / "m.h5"), random.choice([*counts])
        if kind == "at any moment":
            process.join(random.random() * length)
        else:
            wait_for_files(process, killed, random.randint(1, 9))
            process.join(random.choice([0, 0.002, 0.01]))
        process.kill()
        process.join()
        epochs = check(killed, whole, epochs)
        if process.exitcode:
            assert process.exitcode == -signal.SIGKILL, process.exitcode
            counts[kind] += 1
        else:
            assert epochs is None, "exit without a model"
            names = {path.name for path in killed.iterdir()}
            assert names == {*os.listdir(whole), "m.previous.h5"}, names
            complete += 1
        if epochs is None:
            shutil.rmtree(killed)
            epochs = 0
    print(f"trainings killed {counts}")
    print(f"trainings that were resumed to their end, the same file: {complete}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    args = parser.parse_args()
    random.seed(1)
    with tempfile.TemporaryDirectory() as folder:
        kill_trainings(args.kills, Path(folder))
    print("Nothing was torn, lost or doubled.")


if __name__ == "__main__":
    main()
