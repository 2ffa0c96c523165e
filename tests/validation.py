"""Measure a model on its own validation part: views, light, calibration.

    python train.py --validation-split 0.1 --model-path models/trial/trial.h5
    python tests/validation.py models/trial/trial.h5   # 3 minutes; needs data/train

The part is cut from data/train as it was in training, by what the model file tells.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import softmax

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
LIGHT = {
    "as it is": lambda faces: faces,
    "half as bright": lambda faces: 0.5 * faces,
    "a quarter as bright": lambda faces: 0.25 * faces,
    "half the contrast": lambda faces: 0.5 * faces + 0.25,
    "dark tones darker (gamma 2)": lambda faces: faces**2,
    "dark tones lighter (gamma 0.5)": lambda faces: faces**0.5,
}


def read_validation(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the faces, (n, 48, 48, 1), and the class indices of the part."""
    import h5py

    with h5py.File(path) as file:
        arguments = json.loads(file.attrs["arguments"])
        names = json.loads(file.attrs["class_names"])
    index, _ = utils.index_folder(ROOT / "data" / "train", names)
    _, part = train.split_validation(index, arguments["validation_split"])
    faces = np.stack([utils.read_face(path) for path in part.path])
    return faces, part.emotion.cat.codes.to_numpy()


def cross_entropy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean negative log-probability of the right answers."""
    likelihoods = probabilities[np.arange(len(labels)), labels]
    return -np.log(np.maximum(likelihoods, 1e-30)).mean()


def describe(name: str, probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Print accuracy and cross-entropy."""
    accuracy = (probabilities.argmax(axis=1) == labels).mean()
    loss = cross_entropy(probabilities, labels)
    print(f"{name:32} {utils.percent(accuracy):>8} {loss:13.3f}", flush=True)


def describe_calibration(probabilities: np.ndarray, labels: np.ndarray) -> None:
    """Print what the temperatures that two scores choose make of probabilities."""
    print(f"\n{'calibration':24} temperature cross-entropy error too sure by")
    logs = np.log(np.maximum(probabilities, 1e-30))
    scores = {"cross-entropy": cross_entropy, "Brier score": train.brier_score}
    for name, score in scores.items():
        best = minimize_scalar(
            lambda t, score=score: score(softmax(logs / t, axis=1), labels),
            bounds=(0.1, 10),
            method="bounded",
        )
        calibrated = softmax(logs / best.x, axis=1)
        sure, right = calibrated.max(axis=1), calibrated.argmax(axis=1) == labels
        error = utils.calibration_metrics(sure, right)["calibration_error"]
        print(
            f"smallest {name:15} {best.x:11.3f} "
            f"{cross_entropy(calibrated, labels):13.3f} {error:5.3f} "
            f"{utils.percent(sure.mean() - right.mean()):>11}"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path, help="trained with --validation-split")
    path = parser.parse_args().model
    model, _ = utils.load_model(path)
    faces, labels = read_validation(path)

    def predict(faces: np.ndarray, all_views: bool) -> np.ndarray:
        parts = np.array_split(faces, max(1, len(faces) // 256))
        return np.concatenate([utils.predict_faces(model, p, all_views) for p in parts])

    usual = predict(faces, all_views=True)
    print(f"{len(faces)} validation images      accuracy cross-entropy\n\nviews")
    describe("one", predict(faces, all_views=False), labels)
    for name, scales in VIEWS.items():
        utils.SCALES = scales
        describe(name, predict(faces, all_views=True), labels)
    print("\nlight, one view")
    for name, change in LIGHT.items():
        describe(name, predict(change(faces), all_views=False), labels)
    describe_calibration(usual, labels)


if __name__ == "__main__":
    main()
