"""Real processes are stopped by signals, keep what is done, and go on from there."""

import signal
import subprocess
import sys
from pathlib import Path

from conftest import EMOTIONS, SMALL, UNIX


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


@UNIX
def test_real_processes_are_stopped_and_go_on(checkout: Path, tmp_path: Path) -> None:
    # More epochs than needed: the signal may come late on a busy machine.
    options = ["--epochs", "6", "--classes", *EMOTIONS]
    words = ["train.py", *SMALL, *options, "--data-dir", "data/demo"]
    words += ["--model-path", str(tmp_path / "a b" / "m.h5")]

    result = stop_in_epoch(checkout, words, 2, signal.SIGINT)
    assert result.returncode == 130
    assert result.stderr == "train.py: stopped; --resume continues the training\n"

    result = stop_in_epoch(checkout, [*words, "--resume"], 3, signal.SIGTERM)
    assert result.returncode == 143
    assert result.stdout.count("Resumed after epoch 1 of 6.\n") == 1
    assert result.stderr == "train.py: stopped; --resume continues the training\n"
