"""Measure a model on test images by how much they resemble a training image.

    python tests/near_copies.py models/face_classification_model.h5   # needs data/

Images that also stand in train pixel for pixel are left out. Many others are the same
photograph, cut or compressed differently: the correlation of both, shifted against each
other by up to 6 pixels and seen at half size, is then above 0.9.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

SIZE = utils.IMAGE_SIZE // 2
SHIFTS = range(-3, 4)  # of images at half size
CORRELATIONS = [0.96, 0.9, 0.85, -1]  # lower ends of the rows


def halve(split: utils.Split) -> np.ndarray:
    """Return the faces at half size, (n, 24, 24)."""
    return split.faces().reshape(-1, SIZE, 2, SIZE, 2).mean(axis=(2, 4))


def cut(faces: np.ndarray, down: int, right: int) -> np.ndarray:
    """Cut off what a shift moves out of sight; return rows of mean 0 and length 1."""
    rows, columns = (
        slice(max(0, shift), SIZE + min(0, shift)) for shift in (down, right)
    )
    faces = faces[:, rows, columns].reshape(len(faces), -1)
    faces = faces - faces.mean(axis=1, keepdims=True)
    return faces / np.maximum(np.linalg.norm(faces, axis=1, keepdims=True), 1e-6)


def find_nearest(faces: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, ...]:
    """Return for each face the highest correlation with another, and which it is."""
    highest, nearest = np.full(len(faces), -1.0), np.zeros(len(faces), int)
    for down, right in product(SHIFTS, SHIFTS):
        correlations = cut(faces, -down, -right) @ cut(others, down, right).T
        values, best = correlations.max(axis=1), correlations.argmax(axis=1)
        nearest = np.where(values > highest, best, nearest)
        highest = np.maximum(highest, values)
    return highest, nearest


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    network = utils.load_model(parser.parse_args().model)
    known, test = (
        utils.index_folder(ROOT / "data" / name, network.class_names)[0]
        for name in ("train", "test")
    )
    test = test.select(~test.table.digest.isin(known.table.digest))
    highest, nearest = find_nearest(halve(test), halve(known))
    same = known.labels[nearest] == test.labels
    right = utils.predict_split(network, test).argmax(axis=1) == test.labels
    print(f"{len(test.table)} test images, not also in train\n")
    print("correlation, from  images  its label is the same  model is right")
    upper = 2.0
    for lower in CORRELATIONS:
        row = (highest >= lower) & (highest < upper)
        shares = utils.percent(same[row].mean()), utils.percent(right[row].mean())
        print(f"{lower:17g} {row.sum():7} {shares[0]:>22} {shares[1]:>15}")
        upper = lower


if __name__ == "__main__":
    main()
