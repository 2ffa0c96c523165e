"""Same seed, same batches, however many threads ask; validation is never augmented.

Batches are recorded where Keras' fit consumes them, and compared with those that the
iterator gives when it is asked directly, one by one.
"""

import keras
import numpy as np
import pandas as pd
import pytest
from conftest import make_tree
from tensorflow.keras.preprocessing.image import ImageDataGenerator

import train
import utils

CLASSES = ["angry", "happy", "sad"]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """Index 36 images."""
    tree = make_tree(tmp_path_factory.mktemp("iterator") / "faces", CLASSES)
    return utils.index_folder(tree / "train", CLASSES)[0]


def training_iterator(index: pd.DataFrame, **options: float) -> train.FaceIterator:
    """Return an iterator as training uses it."""
    options = {"batch_size": 8, "seed": 5, "erasing": 0.5, "mixup": 0.2} | options
    generator = ImageDataGenerator(horizontal_flip=True, rotation_range=10)
    return train.FaceIterator(index, generator, shuffle=True, **options)


def plain_iterator(index: pd.DataFrame, batch_size: int) -> train.FaceIterator:
    """Return an iterator as validation uses it."""
    return train.FaceIterator(index, ImageDataGenerator(), batch_size, False, seed=5)


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
    index: pd.DataFrame, workers: int
) -> None:
    recorder, epochs = Recorder(), 3
    validation = plain_iterator(index, 10)
    iterator = training_iterator(index, workers=workers)
    recorder.fit(
        iterator,
        epochs=epochs,
        validation_data=validation,
        callbacks=[iterator.follow_epochs()],
        shuffle=False,
        verbose=0,
    )
    expected, reference = [], training_iterator(index)
    for epoch in range(epochs):
        reference.set_epoch(epoch)
        expected += [reference[batch] for batch in range(4)]  # 36 // 8
    assert len(recorder.trained) == len(expected)
    for batch, (faces, labels) in zip(recorder.trained, expected, strict=True):
        np.testing.assert_array_equal(batch[0], faces)
        np.testing.assert_array_equal(batch[1], labels)
    assert [len(faces) for faces, _ in recorder.tested] == [10, 10, 10, 6] * epochs


def test_other_seed_other_batches(index: pd.DataFrame) -> None:
    faces = [training_iterator(index, seed=seed)[0][0] for seed in (5, 6)]
    assert not np.array_equal(*faces)


def test_each_epoch_has_its_own_order_and_no_image_twice(index: pd.DataFrame) -> None:
    iterator = training_iterator(index, erasing=0, mixup=0)
    iterator.generator = ImageDataGenerator()  # so that faces can be told apart
    orders = []
    for epoch in range(2):
        iterator.set_epoch(epoch)
        faces = np.concatenate([iterator[batch][0] for batch in range(len(iterator))])
        orders.append([face.tobytes() for face in faces])
    assert [len(set(order)) for order in orders] == [32, 32]
    assert orders[0] != orders[1]


def test_fewer_images_than_a_batch_make_one_batch(index: pd.DataFrame) -> None:
    iterator = training_iterator(index, batch_size=100)
    assert len(iterator) == 1
    assert iterator[0][0].shape == (36, 48, 48, 1)


def test_validation_is_every_image_bit_for_bit(index: pd.DataFrame) -> None:
    iterator = plain_iterator(index, 10)
    batches = [iterator[batch] for batch in range(len(iterator))]
    faces, labels = map(np.concatenate, zip(*batches, strict=True))
    expected = np.stack([utils.read_face(path) for path in index.path])
    np.testing.assert_array_equal(faces, expected)
    np.testing.assert_array_equal(labels, np.repeat(np.eye(3), 12, axis=0))


def test_training_is_augmented_within_the_range(index: pd.DataFrame) -> None:
    iterator = training_iterator(index, mixup=0)
    faces, labels = iterator[0]
    rows = iterator.index_array[:8]
    plain = np.stack([utils.read_face(index.path[row]) for row in rows])
    assert faces.dtype == np.float32
    assert 0 <= faces.min() < faces.max() <= 1
    assert all(not np.array_equal(a, b) for a, b in zip(faces, plain, strict=True))
    np.testing.assert_array_equal(labels.argmax(axis=1), rows // 12)


def test_mixup_mixes_faces_and_labels_alike(index: pd.DataFrame) -> None:
    iterator = training_iterator(index, erasing=0, mixup=1)
    iterator.generator = ImageDataGenerator()
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
def test_shares_follow_the_beta_distribution(index: pd.DataFrame, alpha: float) -> None:
    iterator = training_iterator(index, erasing=0, mixup=alpha, batch_size=36)
    iterator.generator = ImageDataGenerator()
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
        train.erase(face, random)
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
def test_so_many_are_erased(index: pd.DataFrame, probability: float) -> None:
    iterator = training_iterator(index, erasing=probability, mixup=0, batch_size=36)
    iterator.generator = ImageDataGenerator()
    erased = 0
    for epoch in range(20):
        iterator.set_epoch(epoch)
        faces, plain = iterator[0][0], iterator.index_array
        paths = index.path[plain]
        erased += sum(
            not np.array_equal(face, utils.read_face(path))
            for face, path in zip(faces, paths, strict=True)
        )
    # Standard error: 0.016 of 720 faces.
    assert erased / 720 == pytest.approx(probability, abs=0.05 * (0 < probability < 1))


def is_shifted(face: np.ndarray, original: np.ndarray) -> bool:
    """Tell if a face's centre stands at most 5 pixels away, perhaps mirrored."""
    centre, away = face[10:38, 10:38], range(5, 16)
    return any(
        np.array_equal(centre, source[top : top + 28, left : left + 28])
        for source in (original, original[:, ::-1])
        for top in away
        for left in away
    )


@pytest.mark.parametrize("probability", [0, 0.4, 1])
def test_so_many_are_mirrored_and_shifted_alone(
    index: pd.DataFrame, probability: float
) -> None:
    iterator = training_iterator(
        index, erasing=0, mixup=0, unblurred=probability, batch_size=36
    )
    iterator.generator = ImageDataGenerator(
        horizontal_flip=True,
        rotation_range=15,
        width_shift_range=0.1,
        height_shift_range=0.1,
        zoom_range=0.2,
    )
    shifted = 0
    for epoch in range(10):
        iterator.set_epoch(epoch)
        faces = iterator[0][0]
        paths = index.path[iterator.index_array]
        originals = [utils.read_face(path) for path in paths]
        shifted += sum(map(is_shifted, faces, originals))
        assert not np.array_equal(faces, originals)
    # Standard error: 0.026 of 360 faces.
    assert shifted / 360 == pytest.approx(probability, abs=0.08 * (probability == 0.4))


def test_tones_change_by_exponents_within_gamma(index: pd.DataFrame) -> None:
    iterator = training_iterator(index, erasing=0, mixup=0, gamma=0.5, batch_size=36)
    iterator.generator = ImageDataGenerator()
    exponents = []
    for epoch in range(10):
        iterator.set_epoch(epoch)
        faces = iterator[0][0]
        for face, path in zip(faces, index.path[iterator.index_array], strict=True):
            original = utils.read_face(path)
            inner = (original > 0) & (original < 1)
            exponent = np.log(face[inner]) / np.log(original[inner])
            assert exponent == pytest.approx(exponent[0], abs=1e-3)
            exponents.append(np.log2(exponent[0]))
    assert -0.5 <= min(exponents) < -0.45 and 0.45 < max(exponents) <= 0.5
    assert np.mean(exponents) == pytest.approx(0, abs=0.06)  # standard error: 0.015
