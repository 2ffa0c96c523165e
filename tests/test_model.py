"""The network is as ever, is trained as the recipe says, and is measured rightly.

The references are the model in models/, figures worked out by hand, NumPy and SciPy.
"""

import os
from pathlib import Path
from unittest.mock import Mock

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, MODEL, ROOT, save_model, small_model
from scipy import ndimage

import train
import utils


def test_the_network_is_still_that_of_the_model_in_models() -> None:
    network = utils.load_model(ROOT / MODEL)
    model = train.build_model((48, 48, 1), 6, filters=[48, 96, 192, 384])
    model.set_weights(network.weights)
    faces = np.random.default_rng(1).random((3, 48, 48, 1), np.float32)
    expected = network.predict(faces, tta=False)
    np.testing.assert_allclose(model.predict_on_batch(faces), expected, atol=1e-5)


def test_schedule_optimizer_and_loss() -> None:
    model = small_model()
    train.compile_model(model, learning_rate=0.2, steps=1000)
    optimizer, variables = model.optimizer, model.trainable_variables
    schedule = optimizer._learning_rate
    rates = [float(schedule(step)) for step in (0, 50, 100, 550, 1000)]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.1, 0], atol=1e-6)
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


def test_longer_runs_are_regularized_more() -> None:
    emotion = pd.Categorical(["sad"] * 4750, CLASSES)
    split = utils.Split(pd.DataFrame({"emotion": emotion}), np.empty(0))
    args = train.parse_args(["--epochs", "350", "--precision", "float32"])
    batches, validation = train.make_iterators(split, split, args)
    generator = batches.generator
    assert generator.horizontal_flip
    assert generator.rotation_range == pytest.approx(13.5)
    assert generator.width_shift_range == pytest.approx(0.135)
    assert generator.height_shift_range == pytest.approx(0.135)
    assert generator.zoom_range == pytest.approx([1 - 0.175, 1 + 0.175])
    assert (batches.random_erasing, batches.mixup) == pytest.approx((0.35, 0.15))
    assert batches.batch_size == 47  # a hundred steps an epoch
    assert (validation.random_erasing, validation.mixup) == (0, 0)
    assert not validation.shuffle
    assert not validation.generator.horizontal_flip
    shorter = train.parse_args(["--epochs", "1", "--batch-size", "8"])
    batches, _ = train.make_iterators(split, split, shorter)
    assert batches.batch_size == 8
    assert batches.generator.rotation_range == pytest.approx(12 * 4750 / 425_000)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figures.csv"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), utils.atomic_write(path) as new:
        new.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    with utils.atomic_write(path) as new:
        new.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_windows_locks_is_replaced_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = Mock(side_effect=[PermissionError, PermissionError, None])
    monkeypatch.setattr(os, "replace", replace)
    with utils.atomic_write(tmp_path / "figures.csv") as new:
        new.write_text("new")
    assert replace.call_count == 3


def test_metrics() -> None:
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    predictions = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    metrics = utils.classification_metrics(labels, np.eye(4)[predictions])
    assert metrics["accuracy"] == 4 / 8
    matrix = [[3, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    assert metrics["confusion_matrix"] == matrix
    assert metrics["precision"] == pytest.approx([3 / 5, 1 / 3, 0, 0])
    assert metrics["recall"] == pytest.approx([3 / 4, 1 / 2, 0, 0])
    assert metrics["f1"] == pytest.approx([2 / 3, 2 / 5, 0, 0])
    # A class without images does not count.
    assert metrics["balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 3)


def test_calibration() -> None:
    confidences = np.array([0.34, 0.38, 0.55, 0.55, 0.55, 0.55, 0.95, 1.0])
    right = np.array([0, 1, 1, 1, 0, 0, 1, 1], bool)
    metrics = utils.calibration_metrics(confidences, right)
    # Gaps of the bins [5/15, 6/15), [8/15, 9/15), [14/15, 1], weighted by images.
    error = 2 / 8 * (0.5 - 0.36) + 4 / 8 * (0.55 - 0.5) + 2 / 8 * (1 - 0.975)
    assert metrics["ece"] == pytest.approx(error)
    bins = metrics["reliability"]
    assert bins["images"] == [0, 0, 0, 0, 0, 2, 0, 0, 4, 0, 0, 0, 0, 0, 2]
    assert bins["confidence"][8] == pytest.approx(0.55)
    assert (bins["accuracy"][5], bins["accuracy"][8]) == (0.5, 0.5)
    coverage = [[0.5, 6 / 8, 4 / 6], *([limit, 2 / 8, 1] for limit in (0.6, 0.7, 0.8))]
    np.testing.assert_allclose(metrics["coverage"], coverage)


def test_six_views_are_averaged(tmp_path: Path) -> None:
    faces = np.random.default_rng(1).random((3, 48, 48, 1))
    views = utils.make_views(faces)
    for number, scale in enumerate((1, 0.9, 1.2)):
        # The reference is SciPy's interpolation, about the same middle.
        offset = 23.5 - 23.5 / scale
        for face, view in zip(faces, views[2 * number], strict=True):
            expected = ndimage.affine_transform(
                face[..., 0], [1 / scale] * 2, offset, order=1, mode="nearest"
            )
            np.testing.assert_allclose(view[..., 0], expected, atol=1e-12)
        mirrored = views[2 * number][:, :, ::-1]
        np.testing.assert_array_equal(views[2 * number + 1], mirrored)

    keras.utils.set_random_seed(1)
    network = utils.load_model(save_model(small_model(), tmp_path / "model.h5"))
    each = [network.predict(view, tta=False).astype(float) for view in views]
    mean = np.prod(each, axis=0) ** (1 / 6)
    expected = mean / mean.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(network.predict(faces), expected, rtol=1e-5)
    assert np.abs(expected - each[0]).max() > 1e-4


def test_a_temperature_is_folded_in(tree: Path) -> None:
    keras.utils.set_random_seed(1)
    model, path = small_model(), tree / "model.h5"
    split, _ = utils.index_folder(tree / "test", CLASSES)
    # Far too sure of itself, and right in two of three cases.
    last = model.layers[-1]
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
