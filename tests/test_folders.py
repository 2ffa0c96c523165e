"""Data as people have it: what becomes training and test images, and what is said."""

import errno
import itertools
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EMOTIONS, ROOT, Ask, random_pixels
from PIL import Image

import train
import utils
from utils import UserError

CLASSES = ["angry", "happy", "sad"]


def index(folder: Path, *words: str) -> dict[str, utils.Split]:
    """Index a data folder as train.py does."""
    words += ("--model-path", str(folder.parent / "m.h5"))
    line = ["--data-dir", str(folder), *words]
    return train.index_data(train.parse_args([*line, "--classes", *CLASSES]))


def test_names_of_any_case(tree: Path) -> None:
    expected = index(tree)
    (tree / "train").rename(tree / "Train")
    (tree / "Train" / "sad").rename(tree / "Train" / "SAD")
    (tree / "test" / "happy").rename(tree / "test" / "Happy")
    found = index(tree)
    for name in ("train", "test"):
        np.testing.assert_array_equal(found[name].labels, expected[name].labels)
        assert (found[name].table.digest == expected[name].table.digest).all()
    (tree / "test" / "HAPPY").mkdir()
    line = f"^{tree / 'test'}: HAPPY and Happy are one class; join them$"
    with pytest.raises(UserError, match=line):
        index(tree)


@pytest.mark.parametrize("name", ["validation", "valid", "Val"])
def test_other_names_of_test(
    tree: Path, name: str, capsys: pytest.CaptureFixture
) -> None:
    (tree / "test").rename(tree / name)
    assert len(index(tree)["test"].table) == 12
    assert capsys.readouterr().out.startswith(f"test images: {tree / name}\n")
    shutil.copytree(tree / name / "sad", tree / "test" / "sad")  # is the first choice
    with pytest.raises(UserError, match=r"test: no folder angry, happy; .*: sad$"):
        index(tree)


def test_no_test_folder_names_what_stands_there(tree: Path) -> None:
    (tree / "test").rename(tree / "others")
    (tree / "faces.csv").touch()
    found = "no such folder; found instead: others, train, faces.csv"
    with pytest.raises(UserError, match=f"^{tree / 'test'}: {found}$"):
        index(tree)
    assert len(index(tree / "train")) == 2  # without a test folder beside it
    (tree / "train").rename(tree / "more")
    found = "no such folder; found instead: more, others, faces.csv"
    proposal = "to train on these: --classes more others"
    with pytest.raises(UserError, match=f"^{tree / 'train'}: {found}; {proposal}$"):
        index(tree)


def test_the_classes_found_are_proposed(tree: Path) -> None:
    for part in ("train", "test"):
        (tree / part / "angry").rename(tree / part / "big anger")
    with pytest.raises(UserError) as error:
        index(tree)
    assert str(error.value) == (
        f"{tree / 'train'}: no folder angry; found instead: big anger, happy, sad; "
        "to train on these: --classes 'big anger' happy sad"
    )


def test_class_folders_alone(tree: Path, capsys: pytest.CaptureFixture) -> None:
    folder = tree / "train"
    with pytest.raises(UserError, match=f"^{folder}: holds one split; name the fold"):
        index(folder)
    folder = folder.rename(tree / "mine")
    shutil.copy(folder / "sad" / "00.png", folder / "sad" / "again.png")
    first, again = index(folder), index(folder, "--seed", "7")
    line = f"no train/ and test/ in {folder}: 20% of the images are held out to test\n"
    assert capsys.readouterr().out.count(line) == 2
    with pytest.raises(UserError, match="too few images of angry, happy, sad to hold"):
        train.split_validation(first["test"], 0.01)
    training, test = first["train"].table, first["test"].table
    assert set(test.path) == set(again["test"].table.path)
    assert set(test.path).isdisjoint(training.path)
    assert len(training) + len(test) == 37
    assert test.emotion.value_counts().between(2, 3).all()
    assert not test.in_train.any()


def test_small_classes_and_known_images_are_named(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    shutil.rmtree(tree / "test")
    shutil.copytree(tree / "train", tree / "test")
    for number in range(10):
        (tree / "train" / "sad" / f"{number:02}.png").unlink()
        (tree / "test" / "sad" / f"{number:02}.png").unlink()
    index(tree)
    assert capsys.readouterr().out.endswith(
        "very few images of sad in train: 2\nvery few images of sad in test: 2\n"
        "every test image is also in train\n"
    )


@pytest.mark.parametrize("header", ["emotion,pixels,Usage", "emotion, pixels, Usage"])
def test_fer2013_csv(
    tmp_path: Path, header: str, capsys: pytest.CaptureFixture
) -> None:
    path, lines = tmp_path / "fer2013.csv", [header]
    usages = ["Training", "Training", "PublicTest", "PrivateTest"]
    parts = {"Training": "train", "PublicTest": "test", "PrivateTest": "other"}
    for number, (usage, emotion) in enumerate(itertools.product(usages, range(7))):
        pixels = random_pixels(number)
        lines.append(f"{emotion},{' '.join(map(str, pixels.ravel()))},{usage}")
        folder = tmp_path / "folders" / parts[usage] / train.FER2013_CLASSES[emotion]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number:02}.png")
    path.write_text("\n".join(lines))
    expected, found = index(tmp_path / "folders"), index(path)
    for name in ("train", "test"):
        np.testing.assert_array_equal(found[name].labels, expected[name].labels)
        digests = expected[name].table.digest
        assert found[name].table.digest.tolist() == digests.tolist()
    assert found["train"].table.path[0] == f"{path}, line 2"
    lines += ["0,1 2 3,Training", f"0,{'300 ' * 2304},Training", "0,,Training"]
    lines += [f"3,{'7 ' * 2304},PublicTest", "x,y,z"]
    path.write_text("\n".join(lines))
    capsys.readouterr()
    assert len(index(path)["train"].table) == len(found["train"].table)
    out = capsys.readouterr().out
    for number in range(30, 34):
        place = f"ignored: {path}, line {number}: "
        assert f"{place}not 48 x 48 values of 0 to 255, or all equal\n" in out
    assert f"ignored: {path}, line 34: its emotion is x\n" in out
    assert "ignored, not among the classes: disgust, fear, neutral, surprise\n" in out
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=f"^{path}: not a table like fer2013.csv: "):
        index(path)


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """Return a copy of the drawn faces to test on."""
    return shutil.copytree(ROOT / "data" / "demo" / "test", tmp_path / "mine")


def test_evaluate_without_a_class(mine: Path, ask: Ask) -> None:
    shutil.rmtree(mine / "neutral")
    (mine / "sad").rename(mine / "Sad")
    (mine / "contempt").mkdir()
    code, out, err = ask("--evaluate", mine)
    assert code == 0 and "(50 images, all;" in out
    assert err == (
        "predict.py: no folder for the classes: neutral\n"
        "predict.py: ignored, not among the classes: contempt\n"
    )
    rows = re.findall(r"^ *(\w+) +[\d.]+ +([\d.]+) +[\d.]+ +10$", out, re.MULTILINE)
    recalls = {name: float(recall) for name, recall in rows}
    assert recalls.keys() == set(EMOTIONS) - {"neutral"}
    macro = float(re.search(r"balanced accuracy ([\d.]+) %", out)[1])
    assert macro == pytest.approx(100 * np.mean([*recalls.values()]), abs=0.1)
    for folder in mine.iterdir():
        if folder.name != "contempt":
            shutil.rmtree(folder)
    found = f"no folder {', '.join(EMOTIONS)}; found instead: contempt"
    assert ask("--evaluate", mine)[0] == f"predict.py: error: {mine}: {found}"


def test_evaluate_says_what_it_cannot_read(mine: Path, ask: Ask) -> None:
    broken, known = mine / "sad" / "broken.png", mine.parent / "train"
    broken.touch()
    code, out, err = ask("--evaluate", mine)
    line = f"predict.py: error: {broken}: empty file\n"
    assert (code, err) == (1, line)
    assert "(60 images, all;" in out
    assert "not also in train" not in out  # no train/ beside it: nobody knows
    broken.unlink()
    (known / "cat").mkdir(parents=True)
    code, again, err = ask("--evaluate", mine)
    assert (code, again) == (0, out)
    assert err == (
        f"predict.py: not compared with the images of train: {known}: "
        f"no folder {', '.join(EMOTIONS)}; found instead: cat\n"
    )
    none = mine / "none"
    assert ask("--evaluate", none)[0] == f"predict.py: error: {none}: no such folder"


def test_evaluate_for_programs(tmp_path: Path, ask: Ask) -> None:
    output, plot = tmp_path / "new" / "figures.json", tmp_path / "confusion.png"
    words = ["--format", "json", "--output", output, "--plot", plot]
    assert ask("--evaluate", ROOT / "data/demo/test", *words) == (0, "", "")
    metrics = json.loads(output.read_text())
    assert metrics["test"]["images"] == 60
    assert np.sum(metrics["test"]["confusion_matrix"]) == 60
    assert min(Image.open(plot).size) > 400


def test_a_failed_run_leaves_no_folder(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    words = ["--data-dir", str(tmp_path / "none"), "--model-path"]
    for name in ("new", "mine"):
        with pytest.raises(SystemExit, match="none/train: no such folder"):
            train.main([*words, str(tmp_path / name / "m.h5")])
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize(("name", "kind"), utils.FOREIGN_MODELS.items())
def test_the_format_of_a_foreign_model_is_named(
    tmp_path: Path, name: str, kind: str
) -> None:
    path = tmp_path / f"model{name}"
    path.write_bytes(b"something")
    with pytest.raises(UserError, match=f"that train.py wrote: it is {kind}; make one"):
        utils.load_model(path)


def test_a_locked_file_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries, replace = [], os.replace

    def refuse_twice(source: Path, target: Path) -> None:
        tries.append(target)
        if len(tries) < 3:  # as Windows does while another program reads it
            raise PermissionError(errno.EACCES, "Permission denied", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse_twice)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with utils.atomic_write(tmp_path / "a.txt") as file:
        file.write_text("new")
    assert (tmp_path / "a.txt").read_text() == "new" and len(tries) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}
