"""The index holds every readable image once, and splits never share an image."""

import os
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, UNIX, file_size_limit, make_tree, random_pixels
from PIL import Image

import train
import utils
from utils import UserError


def read_all(table: pd.DataFrame) -> np.ndarray:
    """Read the images of a table one by one."""
    return np.stack([utils.read_pixels(path) for path in table.path])


def test_the_table_has_one_row_per_image(tree: Path) -> None:
    split, unreadable = utils.index_folder(tree / "train", CLASSES, tree)
    assert unreadable == []
    table = split.table
    assert table.emotion.value_counts().to_dict() == dict.fromkeys(CLASSES, 12)
    assert table.path[0] == str(tree / "train" / "angry" / "00.png")
    assert table.digest.dtype == np.uint64
    assert table.digest.nunique() == 36
    np.testing.assert_array_equal(split.pixels, read_all(table))
    np.testing.assert_array_equal(split.labels, np.repeat([0, 1, 2], 12))
    assert isinstance(split.pixels, np.memmap)
    assert {path.name for path in tree.iterdir()} == {"train", "test"}


def test_splits_keep_their_own_pixels(tree: Path) -> None:
    split, _ = utils.index_folder(tree / "train", CLASSES)
    part = split.select(split.table.path.str.endswith(("3.png", "7.png")))
    assert list(part.table.index) == [3, 7, 15, 19, 27, 31]
    expected = utils.to_input(read_all(part.table))
    np.testing.assert_array_equal(part.faces(), expected)
    np.testing.assert_array_equal(part.faces(np.array([4, 1])), expected[[4, 1]])


@UNIX
def test_a_full_disk_is_one_line(tree: Path, tmp_path: Path) -> None:
    line = rf"^{tmp_path}: cannot write there: .* large$"
    with file_size_limit(30_000), pytest.raises(UserError, match=line):
        utils.index_folder(tree / "train", CLASSES, tmp_path)
    assert list(tmp_path.iterdir()) == [tree]


def test_labels_follow_the_classes_not_the_folders(tree: Path) -> None:
    split, _ = utils.index_folder(tree / "train", ["sad", "angry"])
    labels = dict(zip(split.table.emotion, split.labels, strict=True))
    assert labels == {"sad": 0, "angry": 1}


def test_equal_pixels_have_equal_digests_in_any_format(tree: Path) -> None:
    folder = tree / "test" / "happy"
    face = Image.fromarray(random_pixels(99))
    face.save(folder / "a.BMP")
    face.convert("RGB").save(folder / "b.webp", lossless=True)
    Image.fromarray(random_pixels(99) ^ 1).save(folder / "c.png")
    table = utils.index_folder(tree / "test", CLASSES)[0].table
    digest = dict(zip(map(os.path.basename, table.path), table.digest, strict=True))
    assert digest["a.BMP"] == digest["b.webp"] != digest["c.png"]


def test_unreadable_files_are_ignored_and_listed(tree: Path) -> None:
    folder = tree / "train" / "happy"
    whole = (folder / "00.png").read_bytes()
    bad = {"truncated.png": whole[:500], "empty.jpg": b"", "notes.txt": b"no image"}
    never_read = {"Thumbs.db": b"ignored", ".DS_Store": b"ignored"}
    for name, content in (bad | never_read).items():
        (folder / name).write_bytes(content)
    split, unreadable = utils.index_folder(tree / "train", CLASSES)
    assert len(split.table) == 36
    np.testing.assert_array_equal(split.pixels, read_all(split.table))
    places = [line.partition(": ")[0] for line in unreadable]
    assert places == [str(folder / name) for name in sorted(bad)]


@UNIX
def test_linked_folders_are_read(tree: Path) -> None:
    folder = tree / "train" / "happy"
    folder.rename(tree / "mine")
    folder.mkdir()
    (folder / "mine").symlink_to(tree / "mine")
    (tree / "mine" / "loop").symlink_to(folder)
    index, unreadable = utils.index_folder(tree / "train", CLASSES)
    assert index.table.emotion.value_counts().to_dict() == dict.fromkeys(CLASSES, 12)
    assert index.table.path[12] == str(folder / "mine" / "00.png")
    assert unreadable == []


@pytest.mark.parametrize("content", [None, b"no image"])
def test_a_class_without_images_is_named(tree: Path, content: bytes | None) -> None:
    folder = tree / "train" / "sad"
    shutil.rmtree(folder)
    folder.mkdir()
    if content:
        (folder / "notes.txt").write_bytes(content)
    line = rf"{folder}: no image, {bool(content):d} files"
    with pytest.raises(UserError, match=line):
        utils.index_folder(tree / "train", CLASSES)


def test_without_data_the_message_says_how_to_get_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "ROOT", tmp_path)
    (tmp_path / "data" / "demo").mkdir(parents=True)
    for words in (["--data-dir", str(tmp_path / "data" / "demo")], []):
        with pytest.raises(UserError) as error:
            train.index_data(train.parse_args(words))
        for word in ("kagglehub", "kaggle datasets download", "data/demo"):
            assert word in str(error.value)


def test_validation_shares_no_pixels_with_training(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "faces", CLASSES, train=40)
    for name in ("angry", "sad"):  # every second image twice, some under two labels
        for number in range(0, 40, 2):
            source = tree / "train" / name / f"{number:02}.png"
            shutil.copy(source, tree / "train" / "angry" / f"copy_{name}_{number}.png")
    split, _ = utils.index_folder(tree / "train", CLASSES)
    index = split.table
    training, validation = (p.table for p in train.split_validation(split, 0.25))
    assert len(training) + len(validation) == len(index) == 160
    assert set(training.path).isdisjoint(validation.path)
    assert set(training.digest).isdisjoint(validation.digest)
    different = validation.drop_duplicates("digest").emotion.value_counts()
    assert different["happy"] == 10
    assert different.sum() == 30  # a quarter of 120 different images
    smaller = train.split_validation(split, 0.1)[1].table
    assert 0 < len(smaller) < len(validation)
    assert set(smaller.path) < set(validation.path)


def test_new_images_change_the_split_of_few_old_ones(tmp_path: Path) -> None:
    tree = make_tree(tmp_path / "faces", ["angry", "sad"], train=100)
    shutil.move(tree / "train" / "sad" / "99.png", tmp_path)

    def held_out() -> set[str]:
        split, _ = utils.index_folder(tree / "train", ["angry", "sad"])
        return set(train.split_validation(split, 0.2)[1].table.path)

    before = held_out()
    shutil.move(tmp_path / "99.png", tree / "train" / "sad")
    assert len(before) == len(held_out()) == 40
    assert len(before - held_out()) <= 1


def test_the_seed_does_not_change_what_is_held_out(tree: Path) -> None:
    words = ["--data-dir", str(tree), "--model-path", str(tree.parent / "m.h5")]
    words += ["--validation-split", "0.25", "--seed", "2", "--classes", *CLASSES]
    validation = train.index_data(train.parse_args(words))["validation"].table
    split, _ = utils.index_folder(tree / "train", CLASSES)
    assert validation.equals(train.split_validation(split, 0.25)[1].table)


def test_too_few_images_to_split(tree: Path) -> None:
    split, _ = utils.index_folder(tree / "train", CLASSES)
    line = r"^too few images of angry, happy, sad to hold out 1%$"
    with pytest.raises(UserError, match=line):
        train.split_validation(split, 0.01)


def test_the_table_counts_repeated_and_shared_images(
    tree: Path, capsys: pytest.CaptureFixture
) -> None:
    source = tree / "train" / "sad" / "00.png"
    shutil.copy(source, tree / "train" / "sad" / "again.png")
    for number in range(2):
        shutil.copy(source, tree / "test" / "happy" / f"leak{number}.png")
    parts = {n: utils.index_folder(tree / n, CLASSES)[0] for n in ("train", "test")}
    table = parts["test"].table
    table["in_train"] = table.digest.isin(parts["train"].table.digest)
    unreadable = {"train": [f"file{i}: not an image" for i in range(7)], "test": []}
    train.describe_data(parts, unreadable)
    out = capsys.readouterr().out
    rows = [" ".join(line.split()) for line in out.splitlines() if line]
    assert rows[:9] == [
        "train test",
        "angry 12 4",
        "happy 12 6",
        "sad 13 4",
        "all 37 14",
        "repeated 1 1",
        "also in train 0 2",
        "ignored 7 0",
        "ignored: file0: not an image",
    ]
    assert out.count("not an image") == 5
    assert "2 more in train" in out
