"""Every command that README shows, and that needs no download, runs as it stands.

What it shows as output and as defaults is compared with what the code prints.
"""

import json
import re
import shlex
from collections.abc import Callable

import h5py
import numpy as np
import pytest
from conftest import DEMO, ROOT

import train
import utils

README = (ROOT / "README.md").read_text("utf-8")


def commands() -> list[str]:
    """Return the commands of README's sh blocks, those that && joins one by one."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return re.split(r" && |\n", "\n".join(block.strip() for block in blocks))


# These need real data, pictures or minutes; the demo fixture and CI run the last two,
# and CI runs pip.
FINE_TUNE = (
    "python train.py --data-dir my-faces --fine-tune "
    "models/face_classification_model.h5 --model-path models/mine.h5"
)
ELSEWHERE = {
    FINE_TUNE,
    "python train.py --epochs 15",
    "python predict.py --image new_folder/new_image.jpg",
    DEMO,
    "python -m pytest -q",
}


def test_commands(run: Callable) -> None:
    shown = {command for command in commands() if not command.startswith("pip ")}
    assert shown > ELSEWHERE
    for command in shown - ELSEWHERE:
        result = run(*shlex.split(command)[1:])
        assert (result.returncode, result.stderr) == (0, "")


def test_the_model_can_be_fine_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    args = train.parse_args([*shlex.split(FINE_TUNE)[2:], "--precision", "float32"])
    train.read_widths(args)
    model = train.make_model(args, 10, 0)
    shipped = utils.load_model(utils.MODEL_PATH).weights
    np.testing.assert_array_equal(model.get_weights()[-2], shipped[-2])


@pytest.mark.parametrize(
    ("command", "shown"),
    re.findall(r"^```\n\$ (python predict.py .*?)\n(.*?)^```", README, re.S | re.M),
)
def test_sessions(command: str, shown: str, run: Callable) -> None:
    printed = run(*shlex.split(command)[1:]).stdout
    assert re.findall(r"[A-Za-z]+", printed) == re.findall(r"[A-Za-z]+", shown)
    # Another model, or one that was trained anew, answers otherwise.
    told, expected = (
        [float(figure) for figure in re.findall(r"\d+(?:\.\d+)?", text)]
        for text in (printed, shown)
    )
    # Percentages may differ by 0.2, probabilities by 0.002.
    tolerance = 0.002 if "csv" in command else 0.2
    assert told == pytest.approx(expected, abs=tolerance)


def test_the_figures_are_those_that_the_model_file_holds() -> None:
    with h5py.File(ROOT / utils.MODEL_PATH) as file:
        metrics = {
            # Its code called these by other names.
            name: json.loads(
                file.attrs[stored]
                .replace("macro_recall", "balanced_accuracy")
                .replace("calibration_error", "ece")
            )
            for name, stored in {"test": "test", "not_in_train": "leak_free"}.items()
        }
        class_names = json.loads(file.attrs["class_names"])
    printed = utils.describe_metrics(metrics, class_names)
    command = "$ python predict.py --evaluate data/test\n"
    card = (ROOT / "models" / "README.md").read_text("utf-8")
    assert f"```\n{command}{printed}```\n" in card
    for name in metrics:
        assert f"**{utils.percent(metrics[name]['accuracy'])}**" in README


def test_the_table_of_defaults() -> None:
    rows = dict(re.findall(r"^\| `--([a-z-]+)` \| ([^|]*) \|", README, re.MULTILINE))
    for name, default in vars(train.parse_args([])).items():
        if name == "classes":
            expected = "the six emotions"
        elif isinstance(default, bool):
            expected = "on" if default else "off"
        elif isinstance(default, list):
            expected = " ".join(map(str, default))
        else:
            expected = f"{default:g}" if isinstance(default, float) else str(default)
        assert rows[name.replace("_", "-")] == expected
