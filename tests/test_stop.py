"""Real processes are stopped by signals, and go on as if they had not been."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import UNIX
from test_resume import WORDS, assert_same_training

import train


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
@pytest.mark.usefixtures("empty_figures")
def test_real_processes_are_stopped_and_go_on(checkout: Path, tmp_path: Path) -> None:
    data = ["--data-dir", "data/demo", "--model-path"]
    words = ["train.py", *WORDS, *data, str(tmp_path / "a b" / "m.h5")]
    checkpoint = tmp_path / "a b" / "m.checkpoint.npz"

    result = stop_in_epoch(checkout, words, 2, signal.SIGINT)
    assert result.returncode == 130
    assert result.stderr == "train.py: stopped; --resume goes on\n"

    result = stop_in_epoch(checkout, [*words, "--resume"], 3, signal.SIGTERM)
    assert result.returncode == 143
    assert result.stdout.count("Resumed after epoch 1 of 4.\n") == 1
    assert result.stderr == "train.py: stopped; --resume goes on\n"

    folder = checkout / "data" / "demo"
    whole = ["--data-dir", str(folder), "--model-path", str(tmp_path / "m.h5")]
    train.main([*WORDS, *whole])
    whole[-1] = str(checkpoint.with_name("m.h5"))
    train.main([*WORDS, *whole, "--resume"])
    assert not checkpoint.exists()
    assert_same_training(tmp_path / "a b", tmp_path)
