"""Same seed, same batches, however many threads ask; validation is never augmented.

Batches are recorded where Keras' fit consumes them, and compared with those that the
iterator gives when it is asked directly. Keras is the reference for transformations.
"""

import time
from typing import Any

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import CLASSES, assert_same_arrays, random_pixels
from tensorflow.keras.preprocessing.image import ImageDataGenerator

import train
import utils

GENERATOR = train.FaceGenerator(rotation_range=10, rescale=utils.RESCALE)
AUGMENTED = {"generator": GENERATOR, "random_erasing": 0.5, "mixup": 0.2}


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


def test_fit_gets_the_same_batches_from_many_workers(
    split: utils.Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, expected, seed = [], [], np.random.seed

    def seed_slowly(values: list) -> None:
        seed(values)
        time.sleep(0.001)  # long enough for another thread to disturb

    def record(data: tuple) -> dict:
        batches.append([values.numpy() for values in data])
        return {"loss": 0.0}

    monkeypatch.setattr(np.random, "seed", seed_slowly)
    network = keras.Model()
    network.compile(run_eagerly=True)
    network.train_step = record
    iterator = make_iterator(split, workers=5, **AUGMENTED)
    callbacks = [iterator.follow_epochs()]
    network.fit(iterator, epochs=3, callbacks=callbacks, shuffle=False, verbose=0)
    reference = make_iterator(split, **AUGMENTED)
    for epoch in range(3):
        reference.set_epoch(epoch)
        expected += [reference[batch] for batch in range(4)]  # 36 // 8
    for batch, wanted in zip(batches, expected, strict=True):
        assert_same_arrays(batch, wanted)


def test_each_seed_and_epoch_has_its_own_order(split: utils.Split) -> None:
    orders = set()
    for seed, epoch in ((5, 0), (5, 1), (6, 0)):
        iterator = make_iterator(split, seed=seed)
        iterator.set_epoch(epoch)
        faces = np.concatenate([iterator[batch][0] for batch in range(len(iterator))])
        order = tuple(face.tobytes() for face in faces)
        assert len(order) == len(set(order)) == 32  # no image comes twice
        orders.add(order)
    assert len(orders) == 3
    assert len(make_iterator(split, batch_size=100)) == 1  # of fewer images


def test_validation_is_every_image_bit_for_bit(split: utils.Split) -> None:
    iterator = make_iterator(split, batch_size=10, shuffle=False)
    batches = [iterator[batch] for batch in range(len(iterator))]
    faces, labels = map(np.concatenate, zip(*batches, strict=True))
    expected = split.pixels[::2, ..., np.newaxis] * np.float32(1 / 255)
    np.testing.assert_array_equal(faces, expected)
    np.testing.assert_array_equal(split.faces(), expected)  # what is classified
    np.testing.assert_array_equal(labels, np.repeat(np.eye(3), 12, axis=0))


def test_training_is_augmented_within_the_range(split: utils.Split) -> None:
    iterator = make_iterator(split, **AUGMENTED | {"mixup": 0})
    faces, labels = iterator[0]
    rows = iterator.index_array[:8]
    assert 0 <= faces.min() < faces.max() <= 1
    assert (faces != split.faces(rows)).any(axis=(1, 2, 3)).all()
    np.testing.assert_array_equal(labels.argmax(axis=1), rows // 12)


def test_mixup_mixes_faces_and_labels_alike(split: utils.Split) -> None:
    iterator = make_iterator(split, mixup=1)
    iterator.labels, iterator.num_classes = np.arange(36), 36  # a class per image
    mixed, shares = iterator[0]
    iterator.mixup = 0
    faces, labels = iterator[0]
    weights = shares @ labels.T  # of each face, in each mixed one
    own = weights.diagonal()
    assert 0 < own.min() < own.max() < 1
    np.testing.assert_allclose(weights.sum(axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(mixed, np.tensordot(weights, faces, 1), atol=1e-6)


def test_random_erasing_changes_one_rectangle(split: utils.Split) -> None:
    iterator = make_iterator(split, random_erasing=0.25, batch_size=36)
    sides = []
    for epoch in range(20):
        iterator.set_epoch(epoch)
        faces, plain = iterator[0][0], split.faces(iterator.index_array)
        for changed in (faces != plain)[..., 0]:
            if changed.any():
                height, width = (np.ptp(places) + 1 for places in np.where(changed))
                assert changed.sum() == height * width
                sides += [height, width]
    assert (min(sides), max(sides)) == (6, 24)
    assert len(sides) / 2 / 720 == pytest.approx(0.25, abs=0.05)  # three sigma


@pytest.mark.parametrize(
    "more", [{}, {"vertical_flip": True}, {"fill_mode": "reflect"}, {"shear_range": 9}]
)
def test_faces_are_transformed_as_keras_does(more: dict) -> None:
    options = more | {"horizontal_flip": True, "zoom_range": [0.4, 2.5]}
    options |= {
        "rotation_range": 180,
        "width_shift_range": 0.9,
        "height_shift_range": 0.9,
    }
    ours, keras_own = train.FaceGenerator(**options), ImageDataGenerator(**options)
    for seed in range(100):
        face = random_pixels(seed)[..., np.newaxis].astype(np.float32)
        transform = ours.get_random_transform(face.shape, seed)
        results = [one.apply_transform(face, transform) for one in (ours, keras_own)]
        np.testing.assert_allclose(*results, atol=1e-3)
