"""Kill trainings at random moments, and look at what is left.

    python tests/kills.py --kills 30   # 15 minutes

Half of them are killed at any moment, half while they write a file. After each kill the
next process goes on, until a training is complete; then another begins. The script ends
at the first file that is torn, lost or doubled.
"""

import argparse
import io
import json
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

DEMO = ROOT / "data" / "demo"


def is_running(child: int) -> bool:
    """Tell whether a process still runs.

    Raises:
        AssertionError: if it failed.
    """
    done, status = os.waitpid(child, os.WNOHANG)
    assert not (done and status), f"exit status {status}"
    return not done


def wait(child: int) -> float:
    """Return how many seconds a process takes to its end."""
    begin = time.monotonic()
    while is_running(child):
        time.sleep(0.01)
    return time.monotonic() - begin


def kill_at(child: int, moment: float) -> bool:
    """Kill a process after some seconds; tell whether it still ran."""
    end = time.monotonic() + moment
    while time.monotonic() < end:
        if not is_running(child):
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def kill_in_write(child: int, folder: Path, number: int) -> bool:
    """Kill a process while it writes its nth new file; tell whether it still ran."""
    seen: set[tuple] = set()
    while len(seen) < number:
        if not is_running(child):
            return False
        for path in folder.glob("*.new.*"):
            try:
                seen.add((path.name, path.stat().st_ino))
            except FileNotFoundError:
                continue
    return kill_at(child, random.choice([0, 0.002, 0.01]))


def start_training(path: Path) -> int:
    """Begin a small training on the drawn faces, or go on with it, in a new process.

    That process need not import TensorFlow first.
    """
    words = ["--data-dir", str(DEMO), "--model-path", str(path)]
    words += ["--epochs", "4", "--filters", "4", "8", "--dense-units", "8"]
    if train.checkpoint_path(path).exists():
        words.append("--resume")
    sys.stdout.flush()
    if child := os.fork():
        return child
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        train.main(words)
        os._exit(0)
    except SystemExit as stop:
        train.leave(stop)


class Watched:
    """A folder that trainings are killed in, compared with one left alone."""

    def __init__(self, folder: Path, whole: Path) -> None:
        self.folder, self.path = folder, folder / "m.h5"
        self.history = (whole / "history.csv").read_text()
        self.new = (whole / "m.h5").read_bytes()
        self.old = self.new + b"\0"  # whole, too, and another file
        self.begin()

    def begin(self) -> None:
        """Put a finished training's files there, for the next one to replace."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.path.write_bytes(self.old)
        self.epochs = 0

    def check(self) -> None:
        """Look at every file that a kill has left.

        Raises:
            AssertionError: if one is torn or lost, or an epoch is lost or doubled.
        """
        replaced = self.path.read_bytes() == self.new
        assert replaced or self.path.read_bytes() == self.old, "model file torn"
        previous = self.path.with_suffix(".previous.h5")
        if replaced:
            assert previous.read_bytes() == self.old, "previous model lost"
        history = self.folder / "history.csv"
        assert not history.exists() or history.read_text() == self.history
        checkpoint = train.checkpoint_path(self.path)
        if checkpoint.exists():
            with np.load(checkpoint) as file:
                about = json.loads(str(file["about"]))
                state = [file[name] for name in file.files]
            assert len(state) > 10, "checkpoint torn"
            rows = pd.read_csv(io.StringIO(self.history)).loss
            done = [row["loss"] for row in about["history"]]
            np.testing.assert_allclose(done, rows[: len(done)], rtol=1e-6)
            assert len(done) >= self.epochs, "epochs lost"
            self.epochs = len(done)
        else:
            assert replaced or self.epochs == 0, "checkpoint lost"
            self.epochs = 0  # killed when all was done: the next begins anew


def kill_trainings(kills: int, folder: Path) -> None:
    """Kill trainings so many times, and print counts."""
    length = wait(start_training(folder / "whole" / "m.h5"))
    watched = Watched(folder / "killed", folder / "whole")
    counts = {"at any moment": 0, "while a file was written": 0}
    complete = 0
    while sum(counts.values()) < kills:
        child, kind = start_training(watched.path), random.choice([*counts])
        if kind == "at any moment":
            killed = kill_at(child, random.random() * length)
        else:
            killed = kill_in_write(child, watched.folder, random.randint(1, 9))
        watched.check()
        counts[kind] += killed
        if not killed:
            assert watched.path.read_bytes() == watched.new
            names = set(os.listdir(watched.folder))
            assert names == {*os.listdir(folder / "whole"), "m.previous.h5"}, names
            complete += 1
            watched.begin()
    print(f"trainings killed {counts}")
    print(f"trainings that were resumed to their end, the same file: {complete}")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        kill_trainings(args.kills, Path(folder))
    print("Nothing was torn, lost or doubled.")


if __name__ == "__main__":
    main()
