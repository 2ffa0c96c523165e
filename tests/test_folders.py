"""Data as people have it becomes the images that they mean, and the rest is named.

The reference is each image file read by itself, and the same images in other folders.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CLASSES, EMOTIONS, ROOT, UNIX, Ask, file_size_limit, make_tree
from PIL import Image

import train
import utils
from utils import UserError


def index(folder: Path, *words: str) -> dict[str, utils.Split]:
    """Index a data folder as train.py does."""
    words += ("--model-path", str(folder.parent / "m.h5"))
    line = ["--data-dir", str(folder), *words]
    return train.index_data(train.parse_args([*line, "--classes", *CLASSES]))


def images(splits: dict[str, utils.Split]) -> list[list[tuple[int, int]]]:
    """Sort the labels and digests of all images of train, and of test."""
    parts = (splits["train"], splits["test"])
    return [sorted(zip(s.labels, s.table.digest, strict=True)) for s in parts]


def test_every_readable_image_is_indexed_once(tree: Path) -> None:
    folder = tree / "train" / "happy"
    half = (folder / "00.png").read_bytes()[:500]
    bad = {"01_truncated.png": half, "02_empty.jpg": b"", "notes.txt": b"no image"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    names = ["sad", "happy", "angry"]  # of the outputs, in their order
    split, unreadable = utils.index_folder(tree / "train", names, tree)
    table = split.table
    assert table.emotion.tolist() == np.repeat(names, 12).tolist()
    np.testing.assert_array_equal(split.labels, np.repeat([0, 1, 2], 12))
    assert table.path[0] == str(tree / "train" / "sad" / "00.png")
    pixels = np.stack([utils.read_pixels(path) for path in table.path])
    np.testing.assert_array_equal(split.pixels, pixels)
    assert isinstance(split.pixels, np.memmap)  # FER2013 need not fit into memory
    part = split.select(table.path.str.endswith(("3.png", "7.png")))
    expected = utils.to_input(pixels[[3, 7, 15, 19, 27, 31]])
    np.testing.assert_array_equal(part.faces(), expected)
    np.testing.assert_array_equal(part.faces(np.array([4, 1])), expected[[4, 1]])
    places = [line.partition(": ")[0] for line in unreadable]
    assert places == [str(folder / name) for name in sorted(bad)]
    assert {path.name for path in tree.iterdir()} == {"train", "test"}


def test_folders_may_have_other_usual_names(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    expected = images(index(tree))
    (tree / "train").rename(tree / "Train")
    (tree / "Train" / "sad").rename(tree / "Train" / "SAD")
    (tree / "test").rename(tree / "Val")
    capsys.readouterr()
    assert images(index(tree)) == expected
    assert capsys.readouterr().out.startswith(f"test images: {tree / 'Val'}\n")
    (tree / "test").mkdir()  # is the first choice
    with pytest.raises(UserError, match=f"^{tree / 'test'}: no folder angry, happy"):
        index(tree)
    (tree / "Train" / "Sad").mkdir()
    line = f"^{tree / 'Train'}: SAD and Sad are one class; join them$"
    with pytest.raises(UserError, match=line):
        index(tree)


def test_what_is_missing_is_named_with_a_proposal(tree: Path, run: Callable) -> None:
    folder = tree / "train" / "sad"
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(UserError, match=f"^{folder}: no image, 0 files of other kinds"):
        index(tree)
    for part in ("train", "test"):
        (tree / part / "angry").rename(tree / part / "big anger")
    models = tree.parent / "models"
    result = run("train.py", "--data-dir", tree, "--model-path", models / "m.h5")
    assert result.returncode == 1
    assert result.stderr == (
        f"train.py: error: {tree / 'train'}: no folder angry, fear, neutral, surprise; "
        "found instead: big anger, happy, sad; "
        "to train on these: --classes 'big anger' happy sad\n"
    )
    assert not models.exists()  # a failed training leaves no folder behind
    (tree / "train").rename(tree / "cats")
    (tree / "test").rename(tree / "dogs")
    (tree / "faces.csv").touch()
    found = "no such folder; found instead: cats, dogs, faces.csv"
    proposal = "to train on these: --classes cats dogs"
    with pytest.raises(UserError, match=f"^{tree / 'train'}: {found}; {proposal}$"):
        index(tree)


def test_without_data_the_message_says_how_to_get_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "data" / "demo").mkdir(parents=True)
    with pytest.raises(UserError) as error:
        train.index_data(train.parse_args([]))
    for word in ("data/README.md", "python train.py --data-dir data/demo"):
        assert word in str(error.value)


def test_held_out_images_are_in_no_other_part(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "faces", CLASSES, train=40)
    for name in ("angry", "sad"):  # every second image twice, some under two labels
        for number in range(0, 40, 2):
            source = tree / "train" / name / f"{number:02}.png"
            shutil.copy(source, tree / "train" / "angry" / f"copy_{name}_{number}.png")
    split, _ = utils.index_folder(tree / "train", CLASSES)
    training, validation = (p.table for p in train.split_validation(split, 0.25))
    assert len(training) + len(validation) == len(split.table) == 160
    assert set(training.path).isdisjoint(validation.path)
    assert set(training.digest).isdisjoint(validation.digest)
    different = validation.drop_duplicates("digest").emotion.value_counts()
    assert different["happy"] == 10
    assert different.sum() == 30  # a quarter of 120 different images
    smaller = train.split_validation(split, 0.1)[1].table
    assert set(smaller.path) < set(validation.path)
    with pytest.raises(UserError, match=r"^validation: no image of (angry|happy|sad)$"):
        index(tree, "--validation-split", "0.01")


def test_a_fifth_of_class_folders_alone_is_held_out(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tree / "train"
    with pytest.raises(UserError, match=f"^{folder}: holds one split; name the fold"):
        index(folder)
    folder = folder.rename(tree / "mine")
    first, other_seed = index(folder), index(folder, "--seed", "7")
    line = f"no train/ and test/ in {folder}: 20% of the images are held out to test\n"
    assert capsys.readouterr().out.count(line) == 2
    training, test = first["train"].table, first["test"].table
    assert set(test.path) == set(other_seed["test"].table.path)
    assert set(test.path).isdisjoint(training.path)
    assert len(training) + len(test) == 36
    assert test.emotion.value_counts().between(2, 3).all()
    assert not test.in_train.any()


def test_small_classes_and_known_images_are_named(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    for number in range(10):
        (tree / "train" / "sad" / f"{number:02}.png").unlink()
    shutil.rmtree(tree / "test")
    shutil.copytree(tree / "train", tree / "test")
    index(tree)
    assert capsys.readouterr().out.endswith(
        "very few images of sad in train: 2\nvery few images of sad in test: 2\n"
        "every test image is also in train\n"
    )


@UNIX
def test_a_full_disk_is_one_line(tree: Path) -> None:
    line = rf"^{tree}: cannot write there: .* large$"
    with file_size_limit(30_000), pytest.raises(UserError, match=line):
        utils.index_folder(tree / "train", CLASSES, tree)


def test_fer2013_csv(tree: Path, capsys: pytest.CaptureFixture) -> None:
    expected = index(tree)
    table, rows = tree / "fer2013.csv", []
    for name, usage in (("train", "Training"), ("test", "PublicTest")):
        pixels = [" ".join(map(str, image.ravel())) for image in expected[name].pixels]
        for emotion, text in zip(expected[name].table.emotion, pixels, strict=True):
            number = {"angry": 0, "happy": 3, "sad": 4}[emotion]
            rows.append(f"{number},{text},{usage}")
    lines = ["emotion, pixels, Usage", *reversed(rows)]
    lines += [f"0,{pixels[0]},PrivateTest", f"1,{pixels[0]},Training"]
    lines += ["0,1 2 3,Training", f"0,{'300 ' * 2304},Training"]
    lines += [f"3,{'7 ' * 2304},PublicTest", "x,y,z"]
    table.write_text("\n".join(lines))
    assert images(index(table)) == images(expected)
    out = capsys.readouterr().out
    for number in (52, 53, 54):
        place = f"ignored: {table}, line {number}: "
        assert f"{place}not 48 x 48 values of 0 to 255, or blank\n" in out
    assert "ignored, not among the classes: disgust, x\n" in out
    table.write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=f"^{table}: not a table like fer2013.csv: "):
        index(table)


def test_evaluate_says_what_it_leaves_out(tmp_path: Path, ask: Ask) -> None:
    mine, known = tmp_path / "mine", tmp_path / "train"
    shutil.copytree(ROOT / "data" / "demo" / "test", mine)
    shutil.rmtree(mine / "neutral")
    (mine / "sad").rename(mine / "Sad")
    (mine / "contempt").mkdir()
    broken = mine / "Sad" / "broken.png"
    broken.touch()
    (known / "happy").mkdir(parents=True)
    shutil.copy(mine / "happy" / "03.png", known / "happy")
    output, plot = tmp_path / "new" / "figures.json", tmp_path / "confusion.png"
    words = ["--format", "json", "--output", output, "--plot", plot]
    code, out, err = ask("--evaluate", mine, *words)
    assert (code, out) == (1, "")
    assert err == (
        "predict.py: no folder for the classes: neutral\n"
        "predict.py: ignored, not among the classes: contempt\n"
        f"predict.py: error: {broken}: empty file\n"
    )
    metrics = json.loads(output.read_text())
    assert metrics["class_names"] == EMOTIONS
    assert (metrics["test"]["images"], metrics["not_in_train"]["images"]) == (50, 49)
    counts = np.sum(metrics["test"]["confusion_matrix"], axis=1)
    assert counts.tolist() == [10, 10, 10, 0, 10, 10]
    assert min(Image.open(plot).size) > 400
