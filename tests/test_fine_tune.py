"""--fine-tune goes on with the network of a model file, and changes it gently.

The reference is the weights of that file.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import CLASSES, assert_same_arrays, save_model, small_model

import train
import utils


@pytest.fixture
def trained(tree: Path, empty_figures: None) -> Path:
    """Return the model file of a small network of the classes of faces/, beside it."""
    return save_model(small_model(), tree.parent / "trained.h5")


def fine_tune(model: Path, tuned: Path, *options: object) -> None:
    """Train on faces/ for an epoch of two steps."""
    words = ["--epochs", 1, "--data-dir", tuned.parent / "faces", "--model-path"]
    words += [tuned, "--classes", *CLASSES, "--fine-tune", model, *options]
    train.main(list(map(str, words)))


def test_fine_tuning_begins_with_the_weights(trained: Path) -> None:
    tuned = trained.with_name("tuned.h5")
    # At this rate nothing but batch normalization's statistics moves.
    fine_tune(trained, tuned, "--learning-rate", 1e-9)
    before = utils.load_model(trained).weights
    after = keras.saving.load_model(tuned, compile=False).weights
    for weight, values in zip(after, before, strict=True):
        moved = not np.allclose(weight, values, atol=1e-6)
        assert moved == ("moving" in weight.path), weight.path
    arguments = json.loads(tuned.with_name("metrics.json").read_text())["arguments"]
    assert (arguments["fine_tune"], arguments["filters"]) == (True, [4, 8])


def test_other_classes_get_a_new_output_layer(trained: Path) -> None:
    words = ["--fine-tune", str(trained), "--precision", "float32"]
    # As many classes, in another order.
    args = train.parse_args([*words, "--classes", "sad", "happy", "angry"])
    train.read_widths(args)
    assert (args.filters, args.dense_units) == ([4, 8], 5)
    weights = train.make_model(args, 10, 0).get_weights()
    before = utils.load_model(trained).weights
    assert not np.array_equal(weights[-2], before[-2])
    assert_same_arrays(weights[:-2], before[:-2])


def test_what_does_not_fit_is_refused_and_the_checkpoint_stays(trained: Path) -> None:
    layers = keras.layers
    dense = [keras.Input((48, 48, 1)), layers.Flatten(), layers.Dense(3, "softmax")]
    other = save_model(keras.Sequential(dense), trained.with_name("dense.h5"))
    unfinished = trained.with_name("tuned.checkpoint.npz")
    unfinished.touch()
    for model, line in (
        (trained.with_name("faces"), "faces: no model file there"),
        (other, r"dense\.h5: its layers differ"),
    ):
        with pytest.raises(SystemExit, match=line):
            fine_tune(model, trained.with_name("tuned.h5"), "--restart")
    assert unfinished.exists()


def test_fine_tuning_has_a_low_rate_and_much_regularization(trained: Path) -> None:
    args = train.parse_args(["--precision", "float32", "--fine-tune", str(trained)])
    train.read_widths(args)
    rate = train.make_model(args, 1000, 0).optimizer._learning_rate(100)
    assert float(rate) == pytest.approx(0.001)
    strengths = [train.choose_regularization(args, n) for n in (36, 42_500, 42_501)]
    assert strengths[0] == strengths[1] != strengths[2]
