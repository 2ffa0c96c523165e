"""Same seed, same batches, however many threads ask; validation is never augmented.

Batches are recorded where Keras' fit consumes them, and compared with those that the
iterator gives when it is asked directly, one by one.
"""

from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, assert_same_arrays, random_pixels
from tensorflow.keras.preprocessing.image import ImageDataGenerator

import train
import utils

AUGMENTED = {
    "generator": train.FaceGenerator(
        horizontal_flip=True, rotation_range=10, rescale=utils.RESCALE
    ),
    "random_erasing": 0.5,
    "mixup": 0.2,
}


@pytest.fixture(scope="module")
def split() -> utils.Split:
    """Return 36 images, every second row of more pixels."""
    pixels = np.stack([random_pixels(seed) for seed in range(72)])
    emotions = pd.Categorical(np.repeat(CLASSES, 12), CLASSES)
    table = pd.DataFrame({"emotion": emotions}, index=range(0, 72, 2))
    return utils.Split(table, pixels)


def make_iterator(split: utils.Split, **options: Any) -> train.FaceIterator:
    """Return an iterator as training uses it, but without augmentation."""
    generator = ImageDataGenerator(rescale=utils.RESCALE)
    usual = {"generator": generator, "batch_size": 8, "shuffle": True, "seed": 5}
    return train.FaceIterator(split, **usual | options)


class Recorder(keras.Model):
    """Keep every batch that fit and evaluate hand to the network."""

    def __init__(self) -> None:
        super().__init__()
        self.trained, self.tested = [], []
        self.compile(run_eagerly=True)

    def train_step(self, data: tuple) -> dict:
        """Record a training batch."""
        self.trained.append([x.numpy() for x in data])
        return {"loss": 0.0}

    def test_step(self, data: tuple) -> dict:
        """Record a validation batch."""
        self.tested.append([x.numpy() for x in data])
        return {"loss": 0.0}


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_fit_gets_the_same_batches_whatever_the_workers(
    split: utils.Split, workers: int
) -> None:
    recorder, epochs = Recorder(), 3
    validation = make_iterator(split, batch_size=10, shuffle=False)
    iterator = make_iterator(split, workers=workers, **AUGMENTED)
    options = {"validation_data": validation, "shuffle": False, "verbose": 0}
    callbacks = [iterator.follow_epochs()]
    recorder.fit(iterator, epochs=epochs, callbacks=callbacks, **options)
    expected, reference = [], make_iterator(split, **AUGMENTED)
    for epoch in range(epochs):
        reference.set_epoch(epoch)
        expected += [reference[batch] for batch in range(4)]  # 36 // 8
    for batch, wanted in zip(recorder.trained, expected, strict=True):
        assert_same_arrays(batch, wanted)
    assert [len(faces) for faces, _ in recorder.tested] == [10, 10, 10, 6] * epochs


def test_other_seed_other_batches(split: utils.Split) -> None:
    faces = [make_iterator(split, seed=n, **AUGMENTED)[0][0] for n in (5, 6)]
    assert not np.array_equal(*faces)


def test_each_epoch_has_its_own_order_and_no_image_twice(split: utils.Split) -> None:
    iterator = make_iterator(split)
    orders = []
    for epoch in range(2):
        iterator.set_epoch(epoch)
        faces = np.concatenate([iterator[batch][0] for batch in range(len(iterator))])
        orders.append([face.tobytes() for face in faces])
    assert [len(set(order)) for order in orders] == [32, 32]
    assert orders[0] != orders[1]


def test_fewer_images_than_a_batch_make_one_batch(split: utils.Split) -> None:
    iterator = make_iterator(split, batch_size=100)
    assert len(iterator) == 1
    assert iterator[0][0].shape == (36, 48, 48, 1)


def test_validation_is_every_image_bit_for_bit(split: utils.Split) -> None:
    iterator = make_iterator(split, batch_size=10, shuffle=False)
    batches = [iterator[batch] for batch in range(len(iterator))]
    faces, labels = map(np.concatenate, zip(*batches, strict=True))
    expected = split.pixels[::2, ..., np.newaxis] * np.float32(1 / 255)
    np.testing.assert_array_equal(faces, expected)
    np.testing.assert_array_equal(labels, np.repeat(np.eye(3), 12, axis=0))


def test_training_is_augmented_within_the_range(split: utils.Split) -> None:
    iterator = make_iterator(split, **AUGMENTED | {"mixup": 0})
    faces, labels = iterator[0]
    rows = iterator.index_array[:8]
    plain = split.faces(rows)
    assert faces.dtype == np.float32
    assert 0 <= faces.min() < faces.max() <= 1
    assert all(not np.array_equal(a, b) for a, b in zip(faces, plain, strict=True))
    np.testing.assert_array_equal(labels.argmax(axis=1), rows // 12)


def test_mixup_mixes_faces_and_labels_alike(split: utils.Split) -> None:
    iterator = make_iterator(split, mixup=1)
    mixed, shares = iterator[0]
    iterator.mixup = 0
    faces, labels = iterator[0]
    # Where neighbours differ in class, the label tells the share; each has its own.
    others = np.roll(labels, 1, axis=0)
    differ = (labels != others).any(axis=1)
    own = shares[differ][labels[differ] == 1][:, None, None, None]
    assert 0 < own.min() < own.max() < 1 and len(np.unique(own)) == differ.sum() > 2
    expected = own * faces[differ] + (1 - own) * np.roll(faces, 1, axis=0)[differ]
    np.testing.assert_allclose(mixed[differ], expected, atol=1e-6)
    np.testing.assert_allclose(shares[~differ], labels[~differ], atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1])
def test_mixup_weights_follow_the_beta_distribution(
    split: utils.Split, alpha: float
) -> None:
    iterator = make_iterator(split, mixup=alpha, batch_size=36)
    own = []
    for epoch in range(40):
        iterator.set_epoch(epoch)
        rows, (_, shares) = iterator.labels[iterator.index_array], iterator[0]
        differ = rows != np.roll(rows, 1)
        own.extend(shares[differ, rows[differ]])
    assert np.mean(own) == pytest.approx(0.5, abs=0.05)
    assert np.var(own) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.1)


def test_erasing_fills_one_rectangle_with_noise() -> None:
    random, areas = np.random.default_rng(1), []
    for _ in range(500):
        face = np.full((48, 48, 1), 2, np.float32)
        train.random_erasing(face, random)
        rows, columns = np.where(face[..., 0] != 2)
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == height * width  # a whole rectangle
        assert min(height, width) >= 6 and max(height, width) <= 24
        noise = face[face != 2]
        assert 0 <= noise.min() < noise.max() < 1
        areas.append(height * width / 48**2)
    assert min(areas) < 0.03 and max(areas) > 0.22
    assert np.mean(areas) == pytest.approx((15 / 48) ** 2, rel=0.1)


@pytest.mark.parametrize("probability", [0, 0.25, 1])
def test_random_erasing_has_its_probability(
    split: utils.Split, probability: float
) -> None:
    iterator = make_iterator(split, random_erasing=probability, batch_size=36)
    erased = 0
    for epoch in range(20):
        iterator.set_epoch(epoch)
        faces, plain = iterator[0][0], split.faces(iterator.index_array)
        erased += (faces != plain).any(axis=(1, 2, 3)).sum()
    # Standard error: 0.016 of 720 faces.
    assert erased / 720 == pytest.approx(probability, abs=0.05 * (0 < probability < 1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"vertical_flip": True, "brightness_range": [0.8, 1.2]},
        {"fill_mode": "reflect"},
        {"shear_range": 9},
    ],
)
def test_faces_are_transformed_as_keras_does(options: dict) -> None:
    options |= {
        "horizontal_flip": True,
        "rotation_range": 180,
        "width_shift_range": 0.9,
        "height_shift_range": 0.9,
        "zoom_range": [0.4, 2.5],
    }
    ours, keras_own = train.FaceGenerator(**options), ImageDataGenerator(**options)
    for seed in range(100):
        face = random_pixels(seed)[..., np.newaxis].astype(np.float32)
        transform = ours.get_random_transform(face.shape, seed)
        result = ours.apply_transform(face, transform)
        expected = keras_own.apply_transform(face, transform)
        assert result.shape == (48, 48, 1) and result.dtype == np.float32
        # Keras changes the brightness of whole gray values only.
        atol = 2 if "brightness_range" in options else 1e-3
        np.testing.assert_allclose(result, expected, atol=atol)
        assert result.max() > 99
