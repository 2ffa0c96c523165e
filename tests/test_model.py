"""The network is what it says, is trained as the recipe says, and is kept whole.

Metrics are compared with figures worked out by hand.
"""

import json
from pathlib import Path

import h5py
import keras
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, SMALL, assert_same_arrays, save_model, small_model
from scipy import ndimage

import train
import utils
from utils import UserError


@pytest.fixture
def model() -> keras.Sequential:
    """Build a small network with random weights, as model files hold it."""
    keras.utils.set_random_seed(1)  # NumPy's too: the tests' faces are drawn from it
    return small_model()


def fit(tree: Path, *options: str) -> tuple[keras.Model, pd.DataFrame]:
    """Train a small network on a tree."""
    words = ["--model-path", str(tree.parent / "model.h5"), "--precision", "float32"]
    args = train.parse_args([*SMALL, *words, *options])
    parts = [utils.index_folder(tree / p, CLASSES)[0] for p in ("train", "test")]
    return train.fit(*parts, args)


def test_layers(model: keras.Sequential) -> None:
    names = [type(layer).__name__ for layer in model.layers]
    stem = "GroupNormalization Conv2D BatchNormalization Activation"
    block = "Conv2D MaxPooling2D BatchNormalization Activation "
    block += "Conv2D BatchNormalization Activation"
    head = "Flatten Dropout Dense BatchNormalization Activation Dropout Dense"
    assert names == f"{stem} {block} {block} {head}".split()
    activations = [x for x in model.layers if isinstance(x, keras.layers.Activation)]
    assert {x.activation for x in activations} == {keras.activations.silu}
    # Convolutions without bias; gamma and beta, mean and variance; dense layers.
    convolutions = 9 * (1 * 2 + 2 * 4 + 4 * 4 + 4 * 8 + 8 * 8)
    normalizations = 4 * (2 + 4 + 4 + 8 + 8 + 5)
    dense = 12 * 12 * 8 * 5 + 5 * 3 + 3
    assert model.count_params() == convolutions + normalizations + dense


def test_light_and_contrast_change_nothing(model: keras.Model) -> None:
    faces = np.random.default_rng(1).random((3, 48, 48, 1), np.float32)
    first = model.layers[0]
    expected = (faces - faces.mean(axis=(1, 2, 3), keepdims=True)) / np.sqrt(
        faces.var(axis=(1, 2, 3), keepdims=True) + first.epsilon
    )
    np.testing.assert_allclose(first(faces), expected, atol=1e-5)


def test_schedule_rises_for_a_tenth_then_falls_to_zero(model: keras.Model) -> None:
    train.compile_model(model, learning_rate=0.2, steps=1000)
    schedule = model.optimizer._learning_rate
    rates = [float(schedule(step)) for step in (0, 50, 100, 550, 1000)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.1, 0], atol=1e-6)


def test_other_seed_other_weights() -> None:
    words = ["--filters", "4", "--dense-units", "4", "--precision", "float32"]
    kernels = []
    for seed in ("7", "8"):
        args = train.parse_args([*words, "--seed", seed])
        kernels.append(train.make_model(args, 10, 0).get_weights()[0])
    assert not np.array_equal(*kernels)


def test_optimizer_and_loss(model: keras.Model) -> None:
    train.compile_model(model, learning_rate=0.2, steps=1000)
    optimizer, variables = model.optimizer, model.trainable_variables
    assert isinstance(optimizer, train.Muon) and optimizer.nesterov
    assert optimizer.weight_decay == optimizer.adam_weight_decay == train.WEIGHT_DECAY
    assert model.loss.label_smoothing == train.LABEL_SMOOTHING
    optimizer.build(variables)
    decayed = {v.name for v in variables if optimizer._use_weight_decay(v)}
    assert decayed == {"kernel"}
    by_muon = [v for v in variables if not optimizer._should_use_adamw(v)]
    assert by_muon == [v for v in variables if v.name == "kernel"][:-1]


def test_steps_of_kernels_are_orthogonal() -> None:
    # The reference is NumPy's singular value decomposition: Muon keeps a gradient's
    # directions, and makes them about equally long.
    gradient = np.random.default_rng(1).normal(size=(3, 3, 4, 8)).astype(np.float32)
    optimizer = train.Muon()
    gradients, steps = train.tf.constant(gradient), optimizer.ns_steps
    step = optimizer.zeropower_via_newtonschulz5(gradients, steps).numpy()
    assert (step.shape, step.dtype) == (gradient.shape, gradient.dtype)
    left, _, right = np.linalg.svd(gradient.reshape(36, 8), full_matrices=False)
    lengths = left.T @ step.reshape(36, 8) @ right.T / (0.2 * 36**0.5)
    diagonal = np.diag(lengths)
    np.testing.assert_allclose(lengths - np.diag(diagonal), 0, atol=1e-5)
    assert 0.6 < diagonal.min() < diagonal.max() < 1.3


def test_the_last_validation_is_of_the_final_weights(tree: Path) -> None:
    model, history = fit(tree, "--epochs", "2")
    assert list(history.columns) == ["accuracy", "loss", "val_accuracy", "val_loss"]
    assert (history.index.name, list(history.index)) == ("epoch", [1, 2])
    test = utils.index_folder(tree / "test", CLASSES)[0]
    probabilities = model.predict_on_batch(test.faces())
    labels = np.eye(3)[test.labels]
    smoothing = train.LABEL_SMOOTHING
    smoothed = (1 - smoothing) * labels + smoothing / 3
    loss = -(smoothed * np.log(probabilities)).sum(axis=1).mean()
    assert loss == pytest.approx(history.val_loss[2], rel=1e-5)
    accuracy = (probabilities.argmax(axis=1) == test.labels).mean()
    assert accuracy == pytest.approx(history.val_accuracy[2])


def test_a_diverging_run_is_stopped(tree: Path) -> None:
    with pytest.raises(UserError, match="lower --learning-rate"):
        fit(tree, "--learning-rate", "1000", "--epochs", "20")


@pytest.mark.parametrize(
    ("images", "strengths"),
    [
        (0, [0, 0, 0, 0, 0, 0]),
        (212_500, [0.2, 6, 0.06, 0.075, 0.125, 0]),
        (425_000, [0.4, 12, 0.12, 0.15, 0.25, 0]),
        (2_900_000, [0.5, 15, 0.15, 0.2, 0.45, 0.3]),
        (10**9, [0.5, 15, 0.15, 0.2, 0.45, 0.3]),
    ],
)
def test_short_runs_are_regularized_less(images: int, strengths: list[float]) -> None:
    strength = train.choose_regularization(train.parse_args(["--epochs", "1"]), images)
    names = ["dropout", "rotation", "shift", "zoom", "random_erasing", "mixup"]
    assert [strength[name] for name in names] == pytest.approx(strengths)


def test_regularization_reaches_network_and_batches(tree: Path) -> None:
    index, _ = utils.index_folder(tree / "train", CLASSES)
    words = ["--filters", "4", "--precision", "float32", "--epochs", "30000"]
    args = train.parse_args(words)
    strength = train.choose_regularization(args, 36)
    model = train.make_model(args, 10, dropout=strength["dropout"])
    rates = [x.rate for x in model.layers if isinstance(x, keras.layers.Dropout)]
    assert rates == [strength["dropout"]] * 2
    batches, validation = train.make_iterators(index, index, args)
    assert batches.random_erasing == strength["random_erasing"]
    assert batches.mixup == strength["mixup"] > 0
    generator, shift = batches.generator, strength["shift"]
    assert generator.horizontal_flip
    assert generator.rotation_range == strength["rotation"]
    assert generator.width_shift_range == generator.height_shift_range == shift
    assert generator.zoom_range == [1 - strength["zoom"], 1 + strength["zoom"]]
    assert (validation.random_erasing, validation.mixup) == (0, 0)
    assert not validation.shuffle
    assert not validation.generator.horizontal_flip


@pytest.mark.parametrize(
    ("images", "most", "size"),
    [(36, 128, 16), (36, 8, 8), (5000, 128, 50), (20_000, 128, 128), (20_000, 64, 64)],
)
def test_batches_leave_a_hundred_steps(images: int, most: int, size: int) -> None:
    emotion = pd.Categorical(["sad"] * images, CLASSES)
    split = utils.Split(pd.DataFrame({"emotion": emotion}), np.empty(0))
    args = train.parse_args(["--batch-size", str(most)])
    assert train.make_iterators(split, split, args)[0].batch_size == size


def test_a_saved_model_comes_back(model: keras.Model, tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    train.compile_model(model, 0.1, 10)
    faces = np.random.rand(4, 48, 48, 1).astype(np.float32)
    model.train_on_batch(faces, np.eye(3)[[0, 1, 2, 0]])
    about = {"class_names": CLASSES, "rescale": utils.RESCALE, "seed": 3}
    train.save_model(model, path, about)
    network = utils.load_model(path)
    assert network.class_names == CLASSES
    predicted = network.predict(faces, tta=False)
    np.testing.assert_allclose(predicted, model.predict_on_batch(faces), atol=1e-5)
    assert_same_arrays(network.weights, model.get_weights())
    with h5py.File(path) as file:
        assert json.loads(file.attrs["seed"]) == 3
        assert "optimizer_weights" not in file
        assert "training_config" not in file.attrs
    assert [p.name for p in tmp_path.iterdir()] == ["model.h5"]


def test_atomic_write_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    with utils.atomic_write(path) as new:
        assert new.suffix == ".csv"  # by which some writers know the format
        new.write_text("first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), utils.atomic_write(path) as new:
        new.write_text("sec")
        raise KeyboardInterrupt
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_metrics() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    metrics = utils.classification_metrics(labels, np.eye(3)[predictions])
    assert metrics["images"] == 8
    assert metrics["accuracy"] == 4 / 8
    assert metrics["confusion_matrix"] == [[3, 1, 0], [1, 1, 0], [1, 1, 0]]
    assert metrics["precision"] == pytest.approx([3 / 5, 1 / 3, 0])
    assert metrics["recall"] == pytest.approx([3 / 4, 1 / 2, 0])
    assert metrics["f1"] == pytest.approx([2 / 3, 2 / 5, 0])
    assert metrics["macro_recall"] == pytest.approx((3 / 4 + 1 / 2) / 3)


def test_calibration() -> None:
    confidences = np.array([0.34, 0.38, 0.55, 0.55, 0.55, 0.55, 0.95, 1.0])
    right = np.array([0, 1, 1, 1, 0, 0, 1, 1], bool)
    metrics = utils.calibration_metrics(confidences, right)
    # Gaps of the bins [5/15, 6/15), [8/15, 9/15), [14/15, 1], weighted by images.
    error = 2 / 8 * (0.5 - 0.36) + 4 / 8 * (0.55 - 0.5) + 2 / 8 * (1 - 0.975)
    assert metrics["calibration_error"] == pytest.approx(error)
    bins = metrics["reliability"]
    assert bins["images"] == [0, 0, 0, 0, 0, 2, 0, 0, 4, 0, 0, 0, 0, 0, 2]
    assert bins["confidence"][8] == pytest.approx(0.55)
    assert (bins["accuracy"][5], bins["accuracy"][8]) == (0.5, 0.5)
    coverage = [[0.5, 6 / 8, 4 / 6], *([limit, 2 / 8, 1] for limit in (0.6, 0.7, 0.8))]
    np.testing.assert_allclose(metrics["coverage"], coverage)


def test_views() -> None:
    faces = np.random.default_rng(1).random((3, 48, 48, 1))
    views = utils.make_views(faces)
    assert len(views) == 2 * len(utils.SCALES)
    np.testing.assert_array_equal(views[0], faces)
    for number, scale in enumerate(utils.SCALES):
        # The reference is SciPy's interpolation, about the same middle.
        offset = 23.5 - 23.5 / scale
        for face, view in zip(faces, views[2 * number], strict=True):
            expected = ndimage.affine_transform(
                face[..., 0], [1 / scale] * 2, offset, order=1, mode="nearest"
            )
            np.testing.assert_allclose(view[..., 0], expected, atol=1e-12)
        mirrored = views[2 * number][:, :, ::-1]
        np.testing.assert_array_equal(views[2 * number + 1], mirrored)


def test_views_are_averaged(model: keras.Model, tmp_path: Path) -> None:
    network = utils.load_model(save_model(model, tmp_path / "model.h5"))
    faces = np.random.default_rng(1).random((3, 48, 48, 1), np.float32)
    single = network.predict(faces, tta=False)
    views = utils.make_views(faces)
    each = [network.predict(view, tta=False).astype(float) for view in views]
    mean = np.prod(each, axis=0) ** (1 / len(views))
    expected = mean / mean.sum(axis=1, keepdims=True)
    average = network.predict(faces)
    np.testing.assert_allclose(average, expected, rtol=1e-5)
    assert np.abs(average - single).max() > 1e-4


def test_a_temperature_is_folded_in(model: keras.Model, tree: Path) -> None:
    split, _ = utils.index_folder(tree / "test", CLASSES)
    last, path = model.layers[-1], tree / "model.h5"
    # Far too sure of itself, and right in two of three cases.
    last.set_weights([5 * weights for weights in last.get_weights()])
    network = utils.load_model(save_model(model, path))
    before = utils.predict_split(network, split)
    labels = np.where(np.arange(12) % 3, before.argmax(axis=1), split.labels)
    split.table["emotion"] = pd.Categorical.from_codes(labels, CLASSES)
    temperature = train.calibrate(model, network, split)
    assert temperature == train.fit_temperature(before, labels) > 1.1
    after = utils.predict_split(utils.load_model(save_model(model, path)), split)
    expected = train.apply_temperature(before, temperature)
    np.testing.assert_allclose(after, expected, rtol=0.01, atol=1e-3)
