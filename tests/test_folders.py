"""Data as people have it: what becomes training and test images, and what is said."""

import errno
import json
import os
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import EMOTIONS, MODEL, ROOT, random_pixels
from PIL import Image

import predict
import train
import utils
from utils import UserError

CLASSES = ["angry", "happy", "sad"]


def index(folder: Path, *words: str) -> dict[str, utils.Split]:
    """Index a data folder as train.py does."""
    words += ("--model-path", str(folder.parent / "m.h5"))
    line = ["--data-dir", str(folder), *words]
    return train.index_data(train.parse_args([*line, "--classes", *CLASSES]))


def paths(split: utils.Split) -> set[str]:
    """Return the paths of a split."""
    return set(split.table.path)


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
    with pytest.raises(
        UserError, match=r"test: no folder angry, happy; found .*: sad$"
    ):
        index(tree)


def test_no_test_folder_names_what_stands_there(tree: Path) -> None:
    (tree / "test").rename(tree / "others")
    with pytest.raises(UserError) as error:
        index(tree)
    found = "no such folder; found instead: others, train"
    assert str(error.value) == f"{tree / 'test'}: {found}"


def test_the_classes_that_are_there_are_proposed(tree: Path) -> None:
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
    with pytest.raises(
        UserError, match=f"^{folder}: holds one part; name the folder ab"
    ):
        index(folder)
    folder = folder.rename(tree / "mine")
    shutil.copy(folder / "sad" / "00.png", folder / "sad" / "again.png")
    first, again = index(folder), index(folder, "--seed", "7")
    line = f"no train/ and test/ in {folder}: 20% of the images are held out to test\n"
    assert capsys.readouterr().out.count(line) == 2
    assert paths(first["test"]) == paths(again["test"])
    assert paths(first["train"]).isdisjoint(paths(first["test"]))
    assert len(first["train"].table) + len(first["test"].table) == 37
    assert first["test"].table.emotion.value_counts().between(2, 3).all()
    assert not first["test"].table.in_train.any()


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
        "no test image is new: all stand in train, too\n"
    )


def write_csv(path: Path, header: str) -> list[tuple[str, str, np.ndarray]]:
    """Write a table like fer2013.csv; return usage, emotion and pixels of each line."""
    rows, lines = [], [header]
    for number, usage in enumerate(
        ["Training"] * 14 + ["PublicTest", "PrivateTest"] * 7
    ):
        pixels, emotion = random_pixels(number), number // (1 + (number >= 14)) % 7
        lines.append(f"{emotion},{' '.join(map(str, pixels.ravel()))},{usage}")
        rows.append((usage, train.FER2013[emotion], pixels))
    path.write_text("\n".join(lines) + "\n")
    return rows


@pytest.mark.parametrize("header", ["emotion,pixels,Usage", "emotion, pixels, Usage"])
def test_fer2013_csv(
    tmp_path: Path, header: str, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "fer2013.csv"
    rows = write_csv(path, header)
    for usage, emotion, pixels in rows:
        part = {"Training": "train", "PublicTest": "test"}.get(usage, "other")
        folder = tmp_path / "folders" / part / emotion
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{len(list(folder.iterdir()))}.png")
    expected, found = index(tmp_path / "folders"), index(path)
    for name in ("train", "test"):
        np.testing.assert_array_equal(found[name].labels, expected[name].labels)
        digests = expected[name].table.digest
        assert found[name].table.digest.tolist() == digests.tolist()
    assert found["train"].table.path[0] == f"{path}, line 2"
    lines = path.read_text().splitlines()
    bad = ["0,1 2 3,Training", f"0,{'300 ' * 2304},Training", "0,,Training"]
    bad += [f"3,{'7 ' * 2304},PublicTest", "x,y,z"]
    path.write_text("\n".join([*lines, *bad]))
    capsys.readouterr()
    assert len(index(path)["train"].table) == len(found["train"].table)
    out = capsys.readouterr().out
    for number in range(30, 34):
        line = (
            f"ignored: {path}, line {number}: no 48 x 48 different values of 0 to 255"
        )
        assert f"{line}\n" in out
    path.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=f"^{path}: not a table like fer2013.csv: "):
        index(path)


def evaluate(folder: Path, *words: str) -> int | str | None:
    """Run predict.py --evaluate with the model that ships; return its exit code."""
    try:
        return predict.main(
            ["--model", str(ROOT / MODEL), "--evaluate", str(folder), *words]
        )
    except SystemExit as stop:
        return stop.code


def test_evaluate_without_a_class(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = shutil.copytree(ROOT / "data" / "demo" / "test", tmp_path / "mine")
    shutil.rmtree(folder / "neutral")
    (folder / "sad").rename(folder / "Sad")
    (folder / "contempt").mkdir()
    assert evaluate(folder) == 0
    out, err = capsys.readouterr()
    assert err == (
        "predict.py: no folder of the model's: neutral\n"
        "predict.py: no class of the model's: contempt\n"
    )
    assert "(50 images, all;" in out
    recalls = [
        float(re.search(rf"^ *{name} +[\d.]+ +([\d.]+)", out, re.MULTILINE)[1])
        for name in EMOTIONS
        if name != "neutral"
    ]
    macro = float(re.search(r"balanced accuracy ([\d.]+) %", out)[1])
    assert macro == pytest.approx(100 * np.mean(recalls), abs=0.1)
    for name in EMOTIONS:
        shutil.rmtree(folder / name, ignore_errors=True)
    shutil.rmtree(folder / "Sad")
    found = f"no folder {', '.join(EMOTIONS)}; found instead: contempt"
    assert evaluate(folder) == f"predict.py: error: {folder}: {found}"


def test_evaluate_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder, output = ROOT / "data" / "demo" / "test", tmp_path / "new" / "figures.json"
    plot = tmp_path / "confusion.png"
    words = ["--format", "json", "--output", str(output), "--plot", str(plot)]
    assert evaluate(folder, *words) == 0
    assert capsys.readouterr() == ("", "")
    metrics = json.loads(output.read_text())
    assert metrics["test"]["images"] == 60
    assert np.sum(metrics["test"]["confusion_matrix"]) == 60
    with Image.open(plot) as image:
        assert min(image.size) > 400
    for words in (
        ["--format", "csv"],
        ["--explain", "a.png"],
        ["--min-confidence", "1"],
    ):
        assert evaluate(folder, *words) == 2
        assert "makes no sense with --evaluate" in capsys.readouterr().err


def test_a_failed_run_leaves_no_folder(tree: Path, tmp_path: Path) -> None:
    words = ["--data-dir", str(tmp_path / "none"), "--model-path"]
    with pytest.raises(SystemExit, match="none/train: no such folder"):
        train.main([*words, str(tmp_path / "new" / "m.h5")])
    assert not (tmp_path / "new").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(SystemExit, match="none/train: no such folder"):
        train.main([*words, str(tmp_path / "mine" / "m.h5")])
    assert list((tmp_path / "mine").iterdir()) == []


@pytest.mark.parametrize(("name", "kind"), utils.FOREIGN_MODELS.items())
def test_other_models_are_named(tmp_path: Path, name: str, kind: str) -> None:
    path = tmp_path / f"model{name}"
    path.write_bytes(b"something")
    with pytest.raises(UserError, match=f"that train.py wrote: it is {kind}; make one"):
        utils.load_model(path)


def test_a_file_that_is_looked_at_is_replaced_later(
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
