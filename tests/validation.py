"""Measure a model, and views of other scales, on its own validation part.

    python train.py --validation-split 0.1 --model-path models/trial/trial.h5
    python tests/validation.py models/trial/trial.h5   # 3 minutes; needs data/train
    python tests/validation.py models/trial/trial.h5 --against models/other.h5

The part is cut from data/train as it was in training, by what the model file tells.
Differences from another model have their standard errors, image by image.
"""

import argparse
import json
import sys
from pathlib import Path

import h5py
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train
import utils

ROOT = Path(__file__).parent.parent
VIEWS = {  # scales, each mirrored, too
    "as it is, and mirrored": [1],
    "and 1.1 times": [1, 1.1],
    "and 0.9 times": [1, 0.9],
    "and 0.9 and 1.1 times": [1, 0.9, 1.1],
    "and 0.9 and 1.2 times": [1, 0.9, 1.2],
    "and 0.8 and 1.2 times": [1, 0.8, 1.2],
    "and 0.9, 1.1 and 1.2 times": [1, 0.9, 1.1, 1.2],
}


def read_attributes(path: Path) -> tuple[list[str], float, dict[str, int]]:
    """Return class names, validation split, and numbers of images of a model file."""
    with h5py.File(path) as file:
        fraction = json.loads(file.attrs["arguments"])["validation_split"]
        names, images = (json.loads(file.attrs[n]) for n in ("class_names", "images"))
        return names, fraction, images


def read_validation(
    class_names: list[str], fraction: float, images: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the faces, (n, 48, 48, 1), and the class indices of the part."""
    split, _ = utils.index_folder(ROOT / "data" / "train", class_names)
    training, validation = train.split_validation(split, fraction)
    found = {"train": len(training.table), "validation": len(validation.table)}
    if not found.items() <= images.items():
        sys.exit(f"trained on {images}, not {found}: by other code, or other images")
    return validation.faces(), validation.labels


def surprises(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the negative log-probability of each right answer, (n,)."""
    likelihoods = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(likelihoods, 1e-30))


def calibrated(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return probabilities at the temperature that train.py would choose."""
    return train.apply_temperature(
        probabilities, train.fit_temperature(probabilities, labels)
    )


def describe(name: str, probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Print accuracy, balanced accuracy, and cross-entropy, as is and calibrated."""
    metrics = utils.classification_metrics(labels, probabilities)
    accuracy, balanced = metrics["accuracy"], metrics["balanced_accuracy"]
    loss = surprises(probabilities, labels).mean()
    best = surprises(calibrated(probabilities, labels), labels).mean()
    print(
        f"{name:32} {utils.percent(accuracy):>8} {utils.percent(balanced):>8} "
        f"{loss:13.3f} {best:7.3f}",
        flush=True,
    )


def compare(
    new: np.ndarray, old: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare two models' probabilities, (n, num_classes), image by image.

    Returns:
        Differences in accuracy and in calibrated cross-entropy; and their standard
        errors.
    """
    scores = [
        (p.argmax(axis=1) == labels, surprises(calibrated(p, labels), labels))
        for p in (new, old)
    ]
    changes = np.subtract(*np.array(scores, float))
    return changes.mean(axis=1), changes.std(axis=1, ddof=1) / len(labels) ** 0.5


def describe_changes(name: str, changes: np.ndarray, errors: np.ndarray) -> None:
    """Print what compare returned, and the sum of both in standard errors."""
    (accuracy, loss), (spread, loss_spread) = changes, errors
    together = accuracy / spread - loss / loss_spread
    print(
        f"{name:16} {100 * accuracy:+8.2f} ± {100 * spread:.2f} % "
        f"{loss:+.4f} ± {loss_spread:.4f} {together:+9.2f}"
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="trained with --validation-split")
    text = "model file to compare it with, which held the same images out"
    parser.add_argument("--against", type=Path, metavar="MODEL", help=text)
    args = parser.parse_args()
    network = utils.load_model(args.model)
    held_out = read_attributes(args.model)
    if args.against and read_attributes(args.against) != held_out:
        sys.exit(f"{args.against}: other classes, or another --validation-split")
    faces, labels = read_validation(*held_out)
    one, usual = (network.predict(faces, tta) for tta in (False, True))
    if args.against:
        other = utils.load_model(args.against)
        print(f"against {args.against}\n{'':26} accuracy  cross-entropy  together")
        for name, new in {"one view": one, "six views": usual}.items():
            old = other.predict(faces, tta=new is usual)
            describe_changes(name, *compare(new, old, labels))
        print()
    heads = f"{'accuracy':>8} {'balanced':>8} {'cross-entropy':>13} {'calibr.':>7}"
    print(f"{f'{len(faces)} validation images':32} {heads}\n\nviews")
    describe("one", one, labels)
    for name, scales in VIEWS.items():
        utils.SCALES = scales
        describe(name, network.predict(faces), labels)


if __name__ == "__main__":
    main()
