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

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
import utils  # noqa: E402

VIEWS = [[1], [1, 1.1], [1, 0.9], [1, 0.9, 1.1], [1, 0.9, 1.2], [1, 0.8, 1.2]]  # scales


def read_validation(path: Path) -> train.Split:
    """Return the images that the training of a model file held out."""
    with h5py.File(path) as file:
        names, arguments, images = (
            json.loads(file.attrs[name])
            for name in ("class_names", "arguments", "images")
        )
    split, _ = utils.index_folder(ROOT / "data" / "train", names)
    training, validation = train.split_validation(split, arguments["validation_split"])
    found = {"train": len(training.table), "validation": len(validation.table)}
    if not found.items() <= images.items():
        reason = "by other code, or other images"
        sys.exit(f"{path}: trained on {images}, not {found}: {reason}")
    return validation


def surprises(probabilities: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the negative log-probability of each right answer, (n,), if calibrated."""
    temperature = train.fit_temperature(probabilities, labels)
    probabilities = train.apply_temperature(probabilities, temperature)
    likelihoods = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(likelihoods, 1e-30))


def compare(
    new: np.ndarray, old: np.ndarray, labels: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compare two models' probabilities, (n, num_classes), image by image.

    Returns:
        Differences in accuracy and in calibrated cross-entropy; and their standard
        errors.
    """
    scores = [(p.argmax(axis=1) == labels, surprises(p, labels)) for p in (new, old)]
    changes = np.subtract(*np.array(scores, float))
    return changes.mean(axis=1), changes.std(axis=1, ddof=1) / len(labels) ** 0.5


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="trained with --validation-split")
    text = "model file to compare it with, which held the same images out"
    parser.add_argument("--against", type=Path, metavar="MODEL", help=text)
    args = parser.parse_args()
    split, network = read_validation(args.model), utils.load_model(args.model)
    faces, labels = split.faces(), split.labels
    if args.against:
        if not read_validation(args.against).table.equals(split.table):
            sys.exit(f"{args.against}: other classes, or another --validation-split")
        other = utils.load_model(args.against)
        print(f"against {args.against}\n{'':26} accuracy  cross-entropy  together")
        for name, tta in {"one view": False, "six views": True}.items():
            answers = [model.predict(faces, tta) for model in (network, other)]
            (accuracy, loss), (spread, loss_spread) = compare(*answers, labels)
            together = accuracy / spread - loss / loss_spread  # in standard errors
            print(
                f"{name:16} {100 * accuracy:+8.2f} ± {100 * spread:.2f} % "
                f"{loss:+.4f} ± {loss_spread:.4f} {together:+9.2f}"
            )
        print()
    print(f"{len(faces)} validation images\n")
    print("scales, each mirrored  accuracy  cross-entropy")
    for scales in ([], *VIEWS):
        utils.SCALES = scales
        answers = network.predict(faces, tta=bool(scales))
        accuracy = utils.percent((answers.argmax(axis=1) == labels).mean())
        name = ", ".join(map(str, scales)) or "one view"
        print(f"{name:21} {accuracy:>9} {surprises(answers, labels).mean():14.3f}")


if __name__ == "__main__":
    main()
