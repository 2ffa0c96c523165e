"""--fine-tune begins with the weights of a model file, and changes them gently."""

import json
from pathlib import Path
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pytest
from conftest import make_tree

import train
import utils

CLASSES = ["angry", "happy", "sad"]
WIDTHS = ["--filters", "4", "6", "--dense-units", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_figures: None) -> Path:
    """Return a folder with faces/ and a network that tells them apart, trained.h5."""
    folder = tmp_path_factory.mktemp("fine_tune")
    make_tree(folder / "faces", CLASSES)
    save(train.build_model((48, 48, 1), 3, [4, 6], 5), folder / "trained.h5")
    return folder


def save(model: keras.Model, path: Path) -> None:
    """Write a model file."""
    about = {"class_names": CLASSES, "rescale": utils.RESCALE}
    utils.save_model(train.to_float32(model), path, about)


def main(folder: Path, name: str, *options: str) -> None:
    """Train on faces/ in this process, for an epoch of two steps."""
    words = ["--epochs", "1", "--data-dir", folder / "faces", "--model-path"]
    train.main([*map(str, [*words, folder / name]), *options, "--classes", *CLASSES])


def weights(path: Path) -> list[np.ndarray]:
    """Read a model file's weights."""
    return utils.load_model(path)[0].get_weights()


def test_it_begins_with_the_weights_and_resumed_needs_no_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = folder / "start.h5"
    start.write_bytes((folder / "trained.h5").read_bytes())
    # At this rate nothing but batch normalization's statistics moves.
    options = ["--learning-rate", "1e-9", "--fine-tune", str(start), *WIDTHS]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="full"):
        patch.setattr(train, "write_results", Mock(side_effect=OSError("full")))
        main(folder, "tuned.h5", *options)
    start.unlink()
    with pytest.raises(SystemExit, match="begun with --fine-tune"):
        main(folder, "tuned.h5", *options[:2], *WIDTHS, "--resume")
    main(folder, "tuned.h5", *options, "--resume")
    names = [weight.path for weight in utils.load_model(folder / "tuned.h5")[0].weights]
    pairs = zip(
        weights(folder / "trained.h5"), weights(folder / "tuned.h5"), strict=True
    )
    moved = [not np.allclose(before, after, atol=1e-6) for before, after in pairs]
    assert moved == ["moving" in name for name in names]
    with h5py.File(folder / "tuned.h5") as file:
        assert json.loads(file.attrs["arguments"])["fine_tune"] == "start.h5"


@pytest.mark.parametrize("classes", [["sad", "angry"], ["sad", "happy", "angry"]])
def test_other_classes_keep_a_new_last_layer(folder: Path, classes: list[str]) -> None:
    model = train.build_model((48, 48, 1), len(classes), [4, 6], 5)
    own = model.get_weights()
    train.take_weights(model, folder / "trained.h5", classes)
    expected = weights(folder / "trained.h5")[:-2] + own[-2:]
    for weight, array in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(weight, array)


def test_other_widths_are_named(folder: Path) -> None:
    options = ["--filters", "4", "--fine-tune", str(folder / "trained.h5")]
    with pytest.raises(
        SystemExit, match=r"trained\.h5: .* --filters 4 6 --dense-units 5$"
    ):
        main(folder, "none.h5", *options)
    assert not (folder / "none.h5").exists()


def test_without_a_model_file_nothing_is_thrown_away(folder: Path) -> None:
    unfinished = folder / "none.checkpoint.npz"
    unfinished.touch()
    with pytest.raises(SystemExit, match="faces: no model file there"):
        main(folder, "none.h5", "--fine-tune", str(folder / "faces"), "--restart")
    assert unfinished.exists()
    unfinished.unlink()


def test_a_network_of_another_kind(folder: Path) -> None:
    layers = keras.layers
    model = keras.Sequential(
        [keras.Input((48, 48, 1)), layers.Flatten(), layers.Dense(3, "softmax")]
    )
    save(model, folder / "dense.h5")
    with pytest.raises(SystemExit, match=r"dense\.h5: another network"):
        main(folder, "none.h5", "--fine-tune", str(folder / "dense.h5"))


def test_it_is_gentle_and_mixes_nothing_unless_it_is_long() -> None:
    words = ["--precision", "float32"]
    args = train.parse_args([*words, "--fine-tune", "some.h5"])
    full = train.regularize(10**9)
    assert args.epochs == 10
    assert train.choose_strength(args, images=42_499) == full | {"mixup": 0}
    assert train.choose_strength(args, images=42_500) == full
    rates = [
        float(train.make_model(a, 1000, 0).optimizer._learning_rate(100))
        for a in (train.parse_args(words), args)
    ]
    np.testing.assert_allclose(rates, [0.006, 0.001], rtol=1e-6)
