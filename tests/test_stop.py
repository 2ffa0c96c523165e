"""A real process that is stopped by a signal says how to go on."""

import subprocess
import sys
from pathlib import Path

from conftest import EMOTIONS, SMALL, UNIX


@UNIX
def test_a_real_process_is_stopped_by_a_signal(checkout: Path, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *SMALL, "--classes", *EMOTIONS]
    words += ["--data-dir", "data/demo", "--model-path", str(tmp_path / "a b" / "m.h5")]
    process = subprocess.Popen(
        [*words, "--epochs", "9"],  # the signal may come late on a busy machine
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            process.terminate()
    line = "train.py: stopped; --resume continues the training\n"
    assert (process.wait(), process.stderr.read()) == (143, line)
