"""Near copies are found: faces moved, brightened and noised, against the originals."""

import near_copies
import numpy as np
import pytest


def test_moved_faces_are_found_and_strangers_are_not() -> None:
    random = np.random.default_rng(1)
    known = random.random((20, 30, 30))  # larger than a face, to be cut from
    copies = 0.5 * known[:5, 5:29, 1:25] + 0.2 + 0.01 * random.random((5, 24, 24))
    faces = np.concatenate([copies, random.random((5, 24, 24))])
    highest, nearest = near_copies.find_nearest(faces, known[:, 3:27, 3:27])
    assert nearest[:5].tolist() == [0, 1, 2, 3, 4]
    assert highest[:5].min() > 0.99
    assert highest[5:].max() < 0.5


def test_correlation_is_that_of_numpy() -> None:
    faces = np.random.default_rng(2).random((2, 24, 24))
    rows = near_copies.standardize(faces)
    expected = np.corrcoef(faces[0].ravel(), faces[1].ravel())[0, 1]
    assert rows[0] @ rows[1] == pytest.approx(expected)
