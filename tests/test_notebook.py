"""Both scripts run inside a process that somebody goes on with, as in a notebook.

Its streams have neither options nor a number, and are here faked by the least that
Python's own classes ask for.
"""

import io
import json
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import pytest
from conftest import MODEL, ROOT, UNIX

import predict
import train

FACE = ROOT / "data" / "demo" / "test" / "surprise" / "02.png"
SMALL = ["--classes", "angry", "happy", "sad", "--filters", "4", "--epochs", "1"]


class OutStream(io.TextIOBase):
    """Keep what is written, as those of Jupyter, Spyder and IDLE pass it on."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        """Write a text."""
        self.text += text
        return len(text)

    def flush(self) -> None:
        """Change nothing."""


def fake_notebook(monkeypatch: pytest.MonkeyPatch) -> list[OutStream]:
    """Make this process one like a notebook's; return its stdout and stderr."""
    streams = [OutStream(), OutStream()]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    return streams


def here(run: Callable[[], Any]) -> Any:
    """Run in the main thread."""
    return run()


def in_thread(run: Callable[[], Any]) -> Any:
    """Run in another thread, and return what it returns or the error it raises."""
    results = []

    def attempt() -> None:
        try:
            results.append(run())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


@pytest.mark.parametrize("start", [here, in_thread])
def test_predict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable
) -> None:
    out, err = fake_notebook(monkeypatch)
    words = ["--model", str(ROOT / MODEL), "--format", "json", "--image"]
    words.append(str(FACE))
    assert start(lambda: predict.main([*words, "--plot", str(tmp_path / "a.png")])) == 0
    assert json.loads(out.text)["path"] == str(FACE)
    assert start(lambda: predict.main([*words, "missing.png"])) == 1
    message = "predict.py: error: missing.png: no such file\n"
    assert err.text == message
    with pytest.raises(SystemExit) as stop:
        start(lambda: predict.main(["--image", "missing.png"]))
    assert stop.value.code == "predict.py: error: missing.png: no such file or folder"
    with pytest.raises(SystemExit) as stop:
        start(lambda: predict.main(["--image", str(FACE), "--output", str(FACE)]))
    assert stop.value.code == 2
    assert err.text.splitlines()[1:] == [
        f"predict.py: error: {FACE}: is to be read; name another file to write"
    ]


def test_predict_reads_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    out, _ = fake_notebook(monkeypatch)
    for stdin, count in ((io.StringIO(f"{FACE}\n"), 1), (None, 0)):
        monkeypatch.setattr(sys, "stdin", stdin)
        assert predict.main(["--model", str(ROOT / MODEL), "--image", "-"]) == 0
        assert out.text.count(str(FACE)) == count
        out.text = ""


@pytest.mark.parametrize("start", [here, in_thread])
def test_train(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable
) -> None:
    out, err = fake_notebook(monkeypatch)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    figure, backend = plt.figure(), plt.get_backend()
    parameters = dict(matplotlib.rcParams)
    words = ["--data-dir", str(tree), "--model-path", str(tmp_path / "m.h5"), *SMALL]
    assert start(lambda: train.main(words)) is None
    assert out.text.count(" - val_loss: ") == 1
    assert "Now try: python predict.py --image " in out.text.splitlines()[-1]
    assert err.text == ""
    with pytest.raises(SystemExit) as stop:
        start(lambda: train.main([*words, "--resume"]))
    path = tmp_path / "m.checkpoint.npz"
    done = "; to go on from a finished one: --fine-tune"
    line = f"train.py: error: {path}: no unfinished training to resume{done}"
    assert stop.value.code == line
    with pytest.raises(SystemExit) as again:
        train.leave(stop.value)
    assert again.value is stop.value
    # What is the user's own stays as it was.
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    assert plt.get_backend() == backend and dict(matplotlib.rcParams) == parameters
    assert plt.get_fignums() == [figure.number]
    plt.close(figure)


def test_an_interrupt_while_tensorflow_is_imported_leaves_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_notebook(monkeypatch)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), train.starting_tensorflow():
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


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
@pytest.mark.parametrize("redirect", ["2>&-", "<&- >/dev/null 2>&-"])
def test_without_streams(tree: Path, tmp_path: Path, redirect: str) -> None:
    output, path = tmp_path / "a.txt", tmp_path / "m.h5"
    words = f"predict.py --image {FACE} --output {output} --plot {tmp_path}/a.png"
    assert python(words, redirect=redirect) == "0\n"
    assert output.read_text().count("%") == 7
    if ">/" not in redirect:  # a training takes its time
        return
    words = f"train.py --data-dir {tree} --model-path {path} {shlex.join(SMALL)}"
    code = f"import sys; sys.stdout = sys.stderr = None; sys.argv = {words.split()}; "
    code += "import runpy; runpy.run_path('train.py', run_name='__main__')"
    assert python(f'-c "{code}"', redirect=redirect) == "0\n"
    assert path.exists()
