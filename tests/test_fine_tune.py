"""--fine-tune goes on with the network of a model file, and changes it gently."""

import json
from pathlib import Path
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pytest
from conftest import (
    CLASSES,
    SMALL,
    assert_same_arrays,
    make_tree,
    save_model,
    small_model,
)

import train
import utils


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_figures: None) -> Path:
    """Return a folder with faces/ and a network that tells them apart, trained.h5."""
    folder = tmp_path_factory.mktemp("fine_tune")
    make_tree(folder / "faces", CLASSES)
    save_model(small_model(), folder / "trained.h5")
    return folder


def main(folder: Path, name: str, *options: str) -> None:
    """Train on faces/ in this process, for an epoch of two steps."""
    words = ["--epochs", "1", "--data-dir", folder / "faces", "--model-path"]
    train.main([*map(str, [*words, folder / name]), *options, "--classes", *CLASSES])


def weights(path: Path) -> list[np.ndarray]:
    """Read a model file's weights."""
    return utils.load_model(path).weights


def test_fine_tuning_begins_with_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # At this rate nothing but batch normalization's statistics moves.
    options = ["--learning-rate", "1e-9", "--fine-tune", str(folder / "trained.h5")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="full"):
        patch.setattr(train, "write_results", Mock(side_effect=OSError("full")))
        main(folder, "tuned.h5", *options)
    different = r"fine_tune .*trained\.h5, not None\. Use the same"
    with pytest.raises(SystemExit, match=different):
        main(folder, "tuned.h5", *options[:2], "--resume")
    main(folder, "tuned.h5", *options, "--resume")
    tuned = keras.saving.load_model(folder / "tuned.h5", compile=False)
    names = [weight.path for weight in tuned.weights]
    files = folder / "trained.h5", folder / "tuned.h5"
    pairs = zip(*map(weights, files), strict=True)
    moved = [not np.allclose(before, after, atol=1e-6) for before, after in pairs]
    assert moved == ["moving" in name for name in names]
    with h5py.File(folder / "tuned.h5") as file:
        arguments = json.loads(file.attrs["arguments"])
    assert (arguments["fine_tune"], arguments["filters"]) == (True, [4, 8])


@pytest.mark.parametrize("classes", [["sad", "angry"], ["sad", "happy", "angry"]])
def test_other_classes_get_a_new_output_layer(folder: Path, classes: list[str]) -> None:
    words = ["--fine-tune", str(folder / "trained.h5"), "--classes", *classes]
    args = train.parse_args([*words, "--precision", "float32"])
    train.read_widths(args)
    assert (args.filters, args.dense_units) == ([4, 8], 5)
    args.filters = [8]
    with pytest.raises(utils.UserError, match="has its own --filters and --dense"):
        train.read_widths(args)
    args.filters, args.dense_units = train.FILTERS, train.DENSE_UNITS
    train.read_widths(args)
    model = train.make_model(args, 10, 0)
    assert model.output_shape == (None, len(classes))
    before = weights(folder / "trained.h5")
    assert not np.array_equal(model.get_weights()[-2], before[-2])
    assert_same_arrays(model.get_weights()[:-2], before[:-2])


def test_without_a_model_file_the_checkpoint_stays(folder: Path) -> None:
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
    save_model(model, folder / "dense.h5")
    with pytest.raises(SystemExit, match=r"dense\.h5: its layers differ"):
        main(folder, "none.h5", "--fine-tune", str(folder / "dense.h5"))


def test_fine_tuning_has_a_low_rate_and_much_regularization(folder: Path) -> None:
    words = ["--precision", "float32", *SMALL]
    args = train.parse_args([*words, "--fine-tune", str(folder / "trained.h5")])
    strengths = [train.choose_regularization(args, n) for n in (36, 42_500, 42_501)]
    assert strengths[0] == strengths[1] != strengths[2]
    assert (strengths[0]["dropout"], strengths[0]["mixup"]) == (0.4, 0)
    rates = [
        float(train.make_model(a, 1000, 0).optimizer._learning_rate(100))
        for a in (train.parse_args(words), args)
    ]
    np.testing.assert_allclose(rates, [0.006, 0.001], rtol=1e-6)
