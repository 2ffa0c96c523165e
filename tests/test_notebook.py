"""Both scripts run inside a process that somebody goes on with, as in a notebook.

Its streams have neither options nor a number, as StringIO has none.
"""

import io
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import CROP, MODEL, ROOT, UNIX

import predict
import train

SMALL = ["--classes", "angry", "happy", "sad", "--filters", "4", "--epochs", "1"]


def fake_notebook(monkeypatch: pytest.MonkeyPatch) -> list[io.StringIO]:
    """Make this process one like a notebook's; return its stdout and stderr."""
    streams = [io.StringIO(), io.StringIO()]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    return streams


def here(run: Callable, *words: object) -> Any:
    """Run a command in the main thread."""
    return run(list(map(str, words)))


def in_thread(run: Callable, *words: object) -> Any:
    """Run a command in another thread; return what it returns, raise what it raises."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(here, run, *words).result()


@pytest.mark.parametrize("start", [here, in_thread])
def test_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable
) -> None:
    out, err = fake_notebook(monkeypatch)
    words = ["--model", ROOT / MODEL, "--format", "json", "--image", CROP]
    assert start(predict.main, *words, "--plot", tmp_path / "a.png") == 0
    assert json.loads(out.getvalue())["path"] == str(CROP)
    assert start(predict.main, *words, "missing.png") == 1
    missing = "predict.py: error: missing.png: no such file or folder"
    assert err.getvalue() == f"{missing}\n"
    with pytest.raises(SystemExit, match=f"^{missing}$"):
        start(predict.main, "--image", "missing.png")
    with pytest.raises(SystemExit, match=r"^2$"):
        start(predict.main, "--image", CROP, "--output", CROP)
    line = f"predict.py: error: {CROP}: is an input; name another file to write\n"
    assert err.getvalue() == f"{missing}\n{line}"


@pytest.mark.parametrize("text", [f"{CROP}\n", None])
def test_predict_reads_a_list(
    monkeypatch: pytest.MonkeyPatch, text: str | None
) -> None:
    out, _ = fake_notebook(monkeypatch)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text) if text else None)
    assert predict.main(["--model", str(ROOT / MODEL), "--image", "-"]) == 0
    assert out.getvalue().count(str(CROP)) == bool(text)


@pytest.mark.parametrize("start", [here, in_thread])
def test_train(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable
) -> None:
    def settings() -> list:
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        return [*handlers, plt.get_fignums(), dict(matplotlib.rcParams)]

    out, err = fake_notebook(monkeypatch)

    figure = plt.figure()
    before = settings()
    words = ["--data-dir", tree, "--model-path", tmp_path / "m.h5", *SMALL]
    assert start(train.main, *words) is None
    assert out.getvalue().count(" - val_loss: ") == 1
    assert "Now try: python predict.py --image " in out.getvalue().splitlines()[-1]
    assert err.getvalue() == ""
    line = f"{tmp_path / 'm.checkpoint.npz'}: no unfinished training to resume"
    with pytest.raises(SystemExit, match=f"^train.py: error: {line}; to go") as stop:
        start(train.main, *words, "--resume")
    with pytest.raises(SystemExit) as again:
        train.leave(stop.value)
    assert again.value is stop.value
    assert settings() == before  # what is the user's own
    plt.close(figure)


def python(words: str, text: str = "", redirect: str = "") -> str:
    """Run python in a shell, with a text on stdin; return what it prints and code."""
    command = f"{shlex.quote(sys.executable)} {words} {redirect}\necho $?"
    return subprocess.run(
        command, shell=True, cwd=ROOT, input=text, capture_output=True, text=True
    ).stdout


@UNIX
def test_a_shell_goes_on_after_a_script() -> None:
    script = "train.py --model-path models/none.h5 --resume"
    assert python(f"-i {script}", text="print(1 + 1)") == "2\n0\n"
    assert python(script) == "1\n"
    assert python("-i predict.py --image missing.png", text="print(1 + 1)") == "2\n0\n"


@UNIX
@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&- >/dev/null 2>&-"])
def test_without_streams(tree: Path, tmp_path: Path, redirect: str) -> None:
    output, path = tmp_path / "a.txt", tmp_path / "m.h5"
    words = f"predict.py --image {CROP} --output {output} --plot {tmp_path}/a.png"
    assert python(words, redirect=redirect) == "0\n"
    assert output.read_text().count("%") == 7
    if redirect == "2>&-":  # messages do not go among the results
        words = f"predict.py --image missing.png {CROP} --format json"
        *records, code = python(words, redirect=redirect).splitlines()
        assert [json.loads(record)["face"] for record in records] == [None, 1]
        assert code == "1"
    if ">/" not in redirect:  # a training takes its time
        return
    words = f"train.py --data-dir {tree} --model-path {path} {shlex.join(SMALL)}"
    code = f"import sys; sys.stdout = sys.stderr = None; sys.argv = {words.split()}; "
    code += "import runpy; runpy.run_path('train.py', run_name='__main__')"
    assert python(f'-c "{code}"', redirect=redirect) == "0\n"
    assert path.exists()
