"""Both scripts run inside a process that somebody goes on with, as in a notebook.

Its streams have neither options nor a number, as StringIO has none.
"""

import io
import json
import sys
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import CROP, MODEL, ROOT, run_train

import predict
import train


def fake_notebook(monkeypatch: pytest.MonkeyPatch) -> list[io.StringIO]:
    """Make this process one like a notebook's; return its stdout and stderr."""
    streams = [io.StringIO(), io.StringIO()]
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{CROP}\n"))
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    return streams


def test_predict(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = fake_notebook(monkeypatch)
    words = ["--model", str(ROOT / MODEL), "--format", "json", "--image"]
    assert predict.main([*words, "-"]) == 0
    monkeypatch.setattr(sys, "stderr", None)  # as pythonw has it, or 2>&- in a shell
    assert predict.main([*words, "missing.png", str(CROP)]) == 1
    records = map(json.loads, out.getvalue().splitlines())  # no message among them
    assert [record["face"] for record in records] == [1, None, 1]


def test_train(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = fake_notebook(monkeypatch)
    before = dict(matplotlib.rcParams)
    run_train(tree, tree / "m.h5", "--epochs", 1)
    assert out.getvalue().count(" - val_loss: ") == 1
    assert "Now try: python predict.py --image " in out.getvalue().splitlines()[-1]
    assert err.getvalue() == ""
    line = f"{tree / 'm.checkpoint.npz'}: no unfinished training to resume"
    with pytest.raises(SystemExit, match=f"^train.py: error: {line}; to go") as stop:
        run_train(tree, tree / "m.h5", "--resume")
    with pytest.raises(SystemExit, match=line):
        train.leave(stop.value)
    # What is the user's own stays, and no window opens.
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == []
