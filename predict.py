"""Tell which emotion a face shows.

    python predict.py --image new_folder/new_image.jpg
    python predict.py --image photos/ more/face.png --model models/demo.h5
    python predict.py --evaluate data/test

For one image it prints the emotion, then the probability of each; for several, a line
each; with --evaluate, how often it is right about a folder of <emotion>/ folders. Run
train.py first, or use the model that is there.
"""

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import utils
from utils import UserError, percent


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with 2."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--image",
        type=Path,
        nargs="+",
        default=argparse.SUPPRESS,
        help="image files of one face each, or folders of them, searched recursively",
    )
    what.add_argument(
        "--evaluate",
        type=Path,
        metavar="FOLDER",
        help="measure the model on a folder that holds <emotion>/ folders",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=utils.MODEL_PATH,
        help="the model file, as train.py wrote it",
    )
    return parser.parse_args(argv)


def find_images(images: Sequence[Path]) -> list[str]:
    """Replace each folder by the files below it.

    Raises:
        UserError: if a path does not exist, or a folder holds no file.
    """
    paths = []
    for image in images:
        if not os.path.exists(image):
            raise UserError(f"{image}: no such file or folder")
        found = list(utils.list_files(image)) if image.is_dir() else [str(image)]
        if not found:
            raise UserError(f"{image}: no file in this folder")
        paths += found
    return paths


def describe(class_names: Sequence[str], probabilities: np.ndarray) -> str:
    """Name the most probable class, as in: Happy (93.1 %)."""
    best = int(np.argmax(probabilities))
    return f"{class_names[best].capitalize()} ({percent(probabilities[best])})"


def predict(args: argparse.Namespace) -> int:
    """Print what each image shows; return 1 if any could not be read, else 0."""
    paths = find_images(args.image)
    model, attributes = utils.load_model(args.model)
    class_names = attributes["class_names"]
    failed = 0
    results = utils.predict_files(model, paths, attributes["image_size"])
    for path, result in zip(paths, results, strict=True):
        if isinstance(result, OSError):
            print(f"predict.py: error: {result}", file=sys.stderr)
            failed = 1
        elif len(paths) > 1:
            print(f"{path}: {describe(class_names, result)}")
        else:
            print(f"{describe(class_names, result)}\n")
            width = max(map(len, class_names))
            for i in np.argsort(-result, kind="stable"):
                name = class_names[i].capitalize()
                print(f"{name:{width}}  {percent(result[i]):>7}")
    return failed


def evaluate(args: argparse.Namespace) -> int:
    """Print how right the model is about a folder; return 1 if a file is unreadable.

    If a folder train/ stands beside it, the images that it holds, too, are told apart.
    """
    model, attributes = utils.load_model(args.model)
    class_names = attributes["class_names"]
    index, unreadable = utils.index_folder(args.evaluate, class_names)
    for line in unreadable:
        print(f"predict.py: error: {line}", file=sys.stderr)
    train_folder = args.evaluate.parent / "train"
    if train_folder.is_dir() and not train_folder.samefile(args.evaluate):
        train_index, _ = utils.index_folder(train_folder, class_names)
        index["in_train"] = index.digest.isin(train_index.digest)
    utils.describe_metrics(utils.evaluate(model, index), class_names)
    return bool(unreadable)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an expected failure is one line and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # bad files are told by name
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be any bytes
    try:
        args = parse_args(argv)
        sys.exit(evaluate(args) if args.evaluate else predict(args))
    except UserError as error:
        sys.exit(f"predict.py: error: {error}")


if __name__ == "__main__":
    main()
