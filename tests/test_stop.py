"""A real process that is stopped by Ctrl-C says how to go on."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import EMOTIONS, SMALL, UNIX


@UNIX
def test_a_real_process_is_stopped_by_ctrl_c(checkout: Path, tmp_path: Path) -> None:
    words = [sys.executable, "train.py", *SMALL, "--classes", *EMOTIONS]
    words += ["--data-dir", "data/demo", "--model-path", str(tmp_path / "a b" / "m.h5")]
    process = subprocess.Popen(
        [*words, "--epochs", "9"],  # the signal may come late on a busy machine
        cwd=checkout,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests in the background of a shell would hand on that they ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for line in process.stdout:
        if line.startswith("Epoch 2/"):
            process.send_signal(signal.SIGINT)
    line = "train.py: stopped; --resume continues the training\n"
    assert (process.wait(), process.stderr.read()) == (130, line)
