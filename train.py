"""Train a convolutional network that classifies facial expressions.

    python train.py --epochs 15
    python train.py --epochs 15 --resume
    python train.py --data-dir data/demo --epochs 15 --model-path models/demo.h5

It reads data/train/<emotion>/ and data/test/<emotion>/. It writes the model file that
predict.py loads, with its figures and plots beside it. Each epoch leaves a checkpoint
there, from which --resume goes on.
"""

import argparse
import contextlib
import filecmp
import functools
import io
import json
import logging
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import h5py
import matplotlib
import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import softmax

import utils
from utils import IMAGE_SIZE, RESCALE, WORKERS, Split, UserError, printable

# TensorFlow leaves oneDNN's faster kernels off on processors without AVX-512 VNNI.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextlib.contextmanager
def silencing_stderr() -> Generator[None, None, None]:
    """Silence what C++ code writes straight to stderr, past every log level."""
    try:
        stderr = os.dup(2)
    except OSError:  # there is none
        yield
        return
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


with silencing_stderr():  # as TensorFlow starts
    import keras
    import tensorflow as tf

    # Keras calls these two deprecated. They are used anyway: they work, and users of
    # this field know and extend them.
    from tensorflow.keras.preprocessing.image import ImageDataGenerator, Iterator

Splits = dict[str, Split]  # train, test, and validation if one is held out

DATA_DIR = Path("data")
TEST_NAMES = ["test", "validation", "valid", "val"]  # folders; the first found is used
TEST_FRACTION = 0.2  # fraction of the images, if there is no folder of test images
FER2013_CLASSES = "angry disgust fear happy sad surprise neutral".split()  # 0 to 6

# The recipe.
CLASS_NAMES = ["angry", "fear", "happy", "neutral", "sad", "surprise"]
FILTERS = [32, 64, 128, 256]  # of each block; each block halves the image
DENSE_UNITS = 256  # of the dense layer before the output layer
BATCH_SIZE = 128  # images per step, at most; large, as Muon's own work is per step
MIN_STEPS_PER_EPOCH = 100  # small data sets need enough steps, too ...
MIN_BATCH_SIZE = 16  # ... but batch normalization needs this many images
LEARNING_RATE = 0.006  # the peak; on the scale of AdamW's rates
FINE_TUNE_RATE_SCALE = 1 / 6  # larger steps would undo what was learned
WARMUP_FRACTION = 0.1  # of all steps, while the learning rate rises
WEIGHT_DECAY = 0.1  # of kernels, times the learning rate
LABEL_SMOOTHING = 0.05  # many labels are wrong; 0.1 made answers underconfident
BATCH_MOMENTUM = 0.95  # of the moving mean and variance: about 20 batches
# Short runs underfit and long runs overfit: regularization grows with the number of
# images that a run will see, and is interpolated between these numbers.
IMAGES_SEEN = [0, 425_000, 2_900_000]  # the last two: 15 and 102 epochs of FER2013
REGULARIZATION = {
    "dropout": [0, 0.4, 0.5],  # before each dense layer
    "rotation": [0, 12, 15],  # degrees to both sides
    "shift": [0, 0.12, 0.15],  # fraction of the image, in each direction
    "zoom": [0, 0.15, 0.2],  # fraction of the size, in and out
    "random_erasing": [0, 0.25, 0.45],  # probability (Zhong et al. 2017)
    "mixup": [0, 0, 0.3],  # alpha (Zhang et al. 2018): long runs learn wrong labels
}
STEPS_PER_EXECUTION = 8  # fewer returns to Python, which cost time
OUTPUT_LAYER = "probabilities"  # name by which Muon recognizes it
PRECISIONS = ["auto", "float32", "mixed_bfloat16", "mixed_float16"]  # Keras policies
CPU_INFO = Path("/proc/cpuinfo")

GET_DATA = """Get FER2013 as data/README.md says, or try the drawn faces:
  python train.py --data-dir data/demo --epochs 15 --model-path models/demo.h5"""


# --- Options ---
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with 2."""
    parser = utils.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    # fmt: off
    add("--epochs", type=int, default=10, help="passes over the training images")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images per step, at most")
    add("--learning-rate", type=float, default=LEARNING_RATE,
        help="the highest; with --fine-tune a sixth of it")
    add("--data-dir", type=Path, default=utils.of_project(DATA_DIR),
        help="holds train/ and test/")
    add("--model-path", type=Path, default=utils.of_project(utils.MODEL_PATH),
        help=".h5 file to write; plots go beside it")
    add("--seed", type=int, default=1, help="same seed, same batches")
    add("--filters", type=int, nargs="+", default=FILTERS,
        help="width of each block; --fine-tune keeps the model's own")
    add("--dense-units", type=int, default=DENSE_UNITS,
        help="width of the dense layer before the last; likewise")
    add("--classes", nargs="+", default=CLASS_NAMES,
        help="class folders, in the order of the outputs")
    add("--validation-split", type=float, default=0.0,
        help="fraction of train/ to validate on")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: the fastest")
    add("--fine-tune", metavar="MODEL", help="model file to start from")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--resume", action="store_true", help="continue the unfinished training")
    add("--restart", action="store_true", help="discard the unfinished training")
    # fmt: on
    args = parser.parse_args(argv)
    if min(args.epochs, args.batch_size, args.dense_units, *args.filters) < 1:
        parser.error("--epochs, --batch-size, --filters, --dense-units: 1 or more")
    if not 0 < args.learning_rate <= 1000:
        parser.error("--learning-rate must be above 0, up to 1000")
    if not 0 <= args.validation_split <= 0.9:
        parser.error("--validation-split must be 0 to 0.9")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be 0 to {2**32 - 1}")
    if IMAGE_SIZE >> len(args.filters) < 1:
        parser.error(f"--filters: {len(args.filters)} blocks are too many")
    if not utils.are_class_names(args.classes):
        parser.error("--classes needs two or more different names that can be printed")
    if args.model_path.suffix != ".h5":
        parser.error(f"--model-path must end in .h5: {args.model_path}")
    if args.model_path.is_dir():
        parser.error(f"--model-path: {args.model_path} is a folder")
    return args


# --- Data ---
def find_splits(data_dir: Path, class_names: Sequence[str]) -> dict[str, Path]:
    """Find the folders of training and test images.

    A folder that holds class folders itself is returned as train alone.
    """
    names = utils.list_folders(data_dir) if data_dir.is_dir() else []
    folders = {name.casefold(): data_dir / name for name in names}
    test = next((folders[name] for name in TEST_NAMES if name in folders), None)
    if test and "train" in folders:
        if "test" not in folders:
            print(f"test images: {printable(test)}")
        return {"train": folders["train"], "test": test}
    if names and utils.match_folders(data_dir, class_names):
        if data_dir.resolve().name == "train" and (data_dir / "../test").is_dir():
            raise UserError(f"{data_dir}: holds one split; name the folder above")
        share = f"{TEST_FRACTION:.0%} of the images are held out to test"
        print(f"no train/ and test/ in {printable(data_dir)}: {share}")
        return {"train": data_dir}
    missing = "test" if "train" in folders else "train"
    message = f"{data_dir / missing}: no such folder"
    found = names + sorted(path.name for path in data_dir.glob("*.csv"))
    if found:
        message += f"; found instead: {', '.join(found)}"
    if missing == "train" and utils.are_class_names(names):
        message += f"; to train on these: --classes {utils.join_command(names)}"
    has_data = set(found) - {"demo"}
    raise UserError(message, "" if has_data else f". {GET_DATA}")


def index_csv(
    path: Path, class_names: Sequence[str], scratch: Path
) -> tuple[Splits, dict[str, list[str]]]:
    """Read FER2013 as its authors distribute it: a CSV file with one image per line.

    Its columns are emotion (0 to 6), pixels and Usage. Lines whose Usage is Training
    are for training, PublicTest for testing; PrivateTest is not used. A message per
    line that cannot be read is returned, too.
    """

    def parse(row: tuple[str, str]) -> np.ndarray:
        place, text = row
        with contextlib.suppress(ValueError, OverflowError):
            pixels = np.array(text.split(), np.uint8).reshape(IMAGE_SIZE, IMAGE_SIZE)
            if not utils.is_blank(Image.fromarray(pixels)):
                return pixels
        raise OSError(f"{place}: not 48 x 48 values of 0 to 255, or blank")

    try:
        options = {"skipinitialspace": True, "na_filter": False, "compression": None}
        rows = pd.read_csv(path, dtype=str, **options)
        rows = rows.rename(columns=str.strip)[["emotion", "pixels", "Usage"]]
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip()
        raise UserError(f"{path}: not a table like fer2013.csv: {reason}") from error
    rows["path"] = [f"{path}, line {row + 2}" for row in rows.index]
    numbers = dict(zip("0123456", FER2013_CLASSES, strict=True))
    rows["emotion"] = rows.emotion.str.strip().replace(numbers)
    print_ignored(set(rows.emotion) - set(class_names))
    rows = rows[rows.emotion.isin(class_names)]
    rows = rows.assign(emotion=pd.Categorical(rows.emotion, class_names))
    rows = rows.sort_values("emotion", kind="stable")
    splits, unreadable = {}, {}
    for name, usage in {"train": "Training", "test": "PublicTest"}.items():
        part = rows[rows.Usage.str.strip() == usage].reset_index(drop=True)
        if part.empty:
            raise UserError(f"{path}: no line of these classes whose Usage is {usage}")
        items = list(zip(part.path, part.pixels, strict=True))
        splits[name], unreadable[name] = utils.index_images(
            part[["path", "emotion"]], items, parse, scratch
        )
    return splits, unreadable


def print_ignored(names: set[str]) -> None:
    """Print the emotions that are there, but are not among the classes."""
    if names:
        listed = printable(", ".join(sorted(names)))
        print(f"ignored, not among the classes: {listed}")


def index_data(args: argparse.Namespace) -> Splits:
    """Decode the images of the data folder, and print what there is.

    The table of test gets a column in_train.
    """
    # The pixels go beside the model: the system's temporary folder may be in memory.
    scratch = args.model_path.parent
    if args.data_dir.is_file():
        splits, unreadable = index_csv(args.data_dir, args.classes, scratch)
    else:
        splits, unreadable, names = {}, {}, set()
        for name, folder in find_splits(args.data_dir, args.classes).items():
            splits[name], unreadable[name] = utils.index_folder(
                folder, args.classes, scratch
            )
            used = utils.match_folders(folder, args.classes).values()
            names.update(set(utils.list_folders(folder)) - {path.name for path in used})
        print_ignored(names)
    train = splits["train"]
    if "test" not in splits:
        train, splits["test"] = split_validation(train, TEST_FRACTION)
    test = splits["test"].table
    test["in_train"] = test.digest.isin(train.table.digest)
    if args.validation_split:
        train, splits["validation"] = split_validation(train, args.validation_split)
    splits["train"] = train
    describe_data(splits, unreadable)
    return splits


def split_validation(split: Split, fraction: float) -> tuple[Split, Split]:
    """Hold out a fraction of the images of every emotion: the second part returned.

    Images with the smallest digests are held out, which is as good as at random. Equal
    images stay together. Adding an image changes little, and a larger fraction contains
    a smaller one: fine-tuning must not train on what the first training held out.
    """
    table = split.table.drop_duplicates("digest")
    digests = table.groupby("emotion", observed=False).digest
    place = (digests.rank() - 0.5) / digests.transform("size")  # 0 to 1
    held_out = split.table.digest.isin(table.digest[place < fraction])
    return split.select(~held_out), split.select(held_out)


def describe_data(splits: Splits, unreadable: dict[str, list[str]]) -> None:
    """Print how many images there are, how many are repeated, and which are ignored.

    Each class needs an image in each split.
    """
    tables = {name: split.table for name, split in splits.items()}
    counts = {name: table.emotion.value_counts() for name, table in tables.items()}
    shown = pd.DataFrame(counts).rename(index=str).rename_axis(index=None)
    shown.loc["all"] = shown.sum()
    shown.loc["repeated"] = [t.digest.duplicated().sum() for t in tables.values()]
    shown.loc["also in train"] = 0
    shown.loc["also in train", "test"] = tables["test"].in_train.sum()
    shown.loc["ignored"] = [len(unreadable.get(name, [])) for name in tables]
    print(f"\n{shown.to_string()}\n")
    for name, lines in unreadable.items():
        for line in lines[:5]:
            print(f"ignored: {printable(line)}")
        if len(lines) > 5:
            print(f"ignored: {len(lines) - 5} more in {name}")
    for name, images in counts.items():
        for emotion, count in images.items():
            if not count:
                raise UserError(f"{name}: no image of {emotion}")
            if count < 3:
                print(f"very few images of {printable(emotion)} in {name}: {count}")
    if tables["test"].in_train.all():
        print("every test image is also in train")


# --- Augmentation ---
class FaceGenerator(ImageDataGenerator):
    """ImageDataGenerator with Pillow in place of SciPy: the same results, faster."""

    def apply_transform(self, x: np.ndarray, transform_parameters: dict) -> np.ndarray:
        """Transform a face, float32 of shape (size, size, 1)."""
        if self.fill_mode != "nearest" or transform_parameters["shear"]:
            return super().apply_transform(x, transform_parameters)
        rest = dict(transform_parameters)
        theta, tx, ty, zx, zy = map(rest.pop, ("theta", "tx", "ty", "zx", "zy"))
        cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
        size, half = len(x), len(x) / 2
        # Pillow would fill the outside with black: add a border that is wide enough.
        reach = half * max(zx, zy) * (abs(cos) + abs(sin)) + abs(tx) + abs(ty)
        border = math.ceil(max(0, reach - half)) + 1
        rows = rows_with_border(size, border)
        image = Image.fromarray(x[..., 0].take(rows, 0).take(rows, 1))
        a, b, d, e = zx * cos, -zy * sin, zx * sin, zy * cos
        c = cos * tx - sin * ty + half + border - half * (a + b)
        f = sin * tx + cos * ty + half + border - half * (d + e)
        # The matrix maps a pixel of the result to its origin.
        matrix, bilinear = (a, b, c, d, e, f), Image.Resampling.BILINEAR
        image = image.transform((size, size), Image.Transform.AFFINE, matrix, bilinear)
        x = np.asarray(image)[..., np.newaxis]
        if rest.pop("flip_horizontal"):
            x = x[:, ::-1]
        return super().apply_transform(x, rest) if any(rest.values()) else x


@functools.cache
def rows_with_border(size: int, border: int) -> np.ndarray:
    """Return row numbers that repeat the first and last row of an image outwards."""
    return np.clip(np.arange(-border, size + border), 0, size - 1)


class FaceIterator(Iterator):
    """Stream the images of a split through an ImageDataGenerator, batch by batch.

    When shuffled, for training, an epoch leaves out the images that do not fill a whole
    batch; in order, no image is missing. A batch depends on seed, epoch and its number,
    not on the thread that asks for it. The generator gets pixels of 0 to 255.
    """

    def __init__(
        self,
        split: Split,
        generator: ImageDataGenerator,
        batch_size: int,
        shuffle: bool,
        seed: int,
        random_erasing: float = 0,
        mixup: float = 0,
        workers: int = WORKERS,
    ) -> None:
        # More than one worker also makes Keras switch off tf.data's autotune, which
        # can hold up the end of an epoch by many seconds.
        super().__init__(len(split.table), batch_size, shuffle, seed, workers=workers)
        self.split, self.generator = split, generator
        self.labels = split.labels
        self.num_classes = len(split.table.emotion.cat.categories)
        self.random_erasing, self.mixup = random_erasing, mixup
        self.set_epoch(0)

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return max(1, self.n // self.batch_size) if self.shuffle else super().__len__()

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return faces (n, 48, 48, 1) in [0, 1] and labels (n, num_classes)."""
        rows = self.index_array[batch * self.batch_size :][: self.batch_size]
        faces = self.split.take(rows)[..., np.newaxis].astype(np.float32)
        labels = np.eye(self.num_classes, dtype=np.float32)[self.labels[rows]]
        with self.lock:  # the parameters come from NumPy's one global generator
            np.random.seed([self.seed, self.epoch, batch])
            parameters = [self.generator.get_random_transform(x.shape) for x in faces]
        random = np.random.default_rng([self.seed, self.epoch, batch])
        for face, transform in zip(faces, parameters, strict=True):
            face[:] = self.generator.apply_transform(face, transform)
            face[:] = self.generator.standardize(face)
            if random.random() < self.random_erasing:
                random_erasing(face, random)
        if self.mixup:
            lam = random.beta(self.mixup, self.mixup, (len(rows), 1)).astype("float32")
            labels = mixup(labels, lam)
            faces = mixup(faces, lam[..., None, None])
        return faces, labels

    def set_epoch(self, epoch: int) -> None:
        """Order the images as they come in an epoch, counted from 0."""
        self.epoch, self.index_array = epoch, np.arange(self.n)
        if self.shuffle:
            np.random.default_rng([self.seed, epoch]).shuffle(self.index_array)

    def follow_epochs(self) -> keras.callbacks.Callback:
        """Return the callback that tells the iterator which epoch fit begins."""
        return keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: self.set_epoch(epoch)
        )

    def on_epoch_end(self) -> None:
        """Change nothing: Keras calls this more often than once an epoch."""


def random_erasing(face: np.ndarray, random: np.random.Generator) -> None:
    """Fill a rectangle of a face, an eighth to half as wide and high, with noise."""
    height, width = random.integers(IMAGE_SIZE // 8, IMAGE_SIZE // 2, 2, endpoint=True)
    top = random.integers(IMAGE_SIZE - height, endpoint=True)
    left = random.integers(IMAGE_SIZE - width, endpoint=True)
    noise = random.random((height, width, 1), np.float32)
    face[top : top + height, left : left + width] = noise


def mixup(values: np.ndarray, lam: np.ndarray) -> np.ndarray:
    """Return lam times each image's values plus 1 - lam times its neighbour's."""
    return lam * values + (1 - lam) * np.roll(values, 1, axis=0)


def make_iterators(
    train: Split, validation: Split, args: argparse.Namespace
) -> tuple[FaceIterator, FaceIterator]:
    """Return iterators: training images augmented, validation images as they are."""
    images = len(train.table)
    strength = choose_regularization(args, images)
    augmented = FaceGenerator(
        horizontal_flip=True,
        rotation_range=strength["rotation"],
        width_shift_range=strength["shift"],
        height_shift_range=strength["shift"],
        zoom_range=strength["zoom"],
        rescale=RESCALE,
    )
    plain = ImageDataGenerator(rescale=RESCALE)
    options = {name: strength[name] for name in ("random_erasing", "mixup")}
    size = min(args.batch_size, max(MIN_BATCH_SIZE, images // MIN_STEPS_PER_EPOCH))
    return (
        FaceIterator(train, augmented, size, True, args.seed, **options),
        FaceIterator(validation, plain, size, False, args.seed),
    )


def choose_regularization(args: argparse.Namespace, images: int) -> dict[str, float]:
    """Return the strength of each regularization for a run on this number of images.

    Fine-tuning starts from weights that have seen many images: it gets at least the
    strength of fifteen epochs of FER2013.
    """
    seen = max(args.epochs * images, IMAGES_SEEN[1] if args.fine_tune else 0)
    return {
        name: float(np.interp(seen, IMAGES_SEEN, strengths))
        for name, strengths in REGULARIZATION.items()
    }


# --- Network ---
def build_model(
    input_shape: tuple[int, int, int],
    num_classes: int,
    filters: Sequence[int] = tuple(FILTERS),
    dense_units: int = DENSE_UNITS,
    dropout: float = 0.0,
    batch_normalization: type[keras.Layer] = keras.layers.BatchNormalization,
) -> keras.Sequential:
    """Build the network: a convolution, blocks of two each, then two dense layers.

    Each image is first brought to mean 0 and variance 1 (as the only group): light and
    contrast tell nothing about a face. A convolution, half as wide as the first block,
    sees the image at full resolution. A block pools right after its first convolution,
    so that all behind it works on a quarter of the pixels. SiLU (Elfwing et al. 2018)
    takes a little longer than ReLU and generalizes better.

    What the network is trained with, dropout and batch_normalization, changes neither
    its weights' shapes nor their order. First and last layer always keep float32.
    """
    layers = keras.layers

    def convolve(width: int, *pool: keras.Layer) -> list[keras.Layer]:
        conv = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
        return [
            layers.Conv2D(width, 3, **conv),
            *pool,
            batch_normalization(),
            layers.Activation("silu"),
        ]

    convolutions = convolve((filters[0] + 1) // 2)
    for width in filters:
        convolutions += convolve(width, layers.MaxPooling2D()) + convolve(width)
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.GroupNormalization(1, center=False, scale=False, dtype="float32"),
            *convolutions,
            layers.Flatten(),
            layers.Dropout(dropout),
            layers.Dense(dense_units, use_bias=False),
            batch_normalization(),
            layers.Activation("silu"),
            layers.Dropout(dropout),
            layers.Dense(
                num_classes, activation="softmax", dtype="float32", name=OUTPUT_LAYER
            ),
        ],
        name="face_classifier",
    )


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization that trains in one kernel, in the precision of its input.

    Keras' own layer runs a dozen operations in float32, which takes longer. The only
    difference: the moving variance is the unbiased one here.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: None = None
    ) -> tf.Tensor:
        """Normalize the last axis of inputs."""
        if not training or len(inputs.shape) != 4:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon
        )
        kept, new = self.momentum, 1 - self.momentum
        self.moving_mean.assign(kept * self.moving_mean + new * mean)
        self.moving_variance.assign(kept * self.moving_variance + new * variance)
        return outputs


# --- Optimizer ---
class Muon(keras.optimizers.Muon):
    """Muon (Jordan et al. 2024) for the kernels of convolutions, too.

    Each step changes a weight matrix by an orthogonal matrix, scaled to the length of
    AdamW's steps (Liu et al. 2025). Keras' Muon does this for dense layers only. AdamW
    updates the rest: gamma, beta, and the output layer.
    """

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        return len(variable.shape) < 2 or OUTPUT_LAYER in variable.path

    def lr_adjust(self, x: tf.Tensor) -> tf.Tensor:
        """Return a step unchanged: it is scaled below."""
        return x

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """Return the orthogonal matrix nearest to a kernel (..., filters), scaled."""
        matrix = tf.reshape(x, (-1, x.shape[-1]))
        step = super().zeropower_via_newtonschulz5(matrix, steps)
        return tf.reshape(self.rms_rate * max(matrix.shape) ** 0.5 * step, x.shape)


def choose_precision() -> str:
    """Return the name of the Keras dtype policy that is fastest on this machine.

    GPUs have bfloat16 from compute capability 8.0 on, and float16 from 7.0 on.
    Processors without bfloat16 instructions emulate it, slower than float32.
    """
    if gpus := tf.config.list_physical_devices("GPU"):
        details = map(tf.config.experimental.get_device_details, gpus)
        oldest = min(detail.get("compute_capability", (0, 0)) for detail in details)
        if oldest >= (8, 0):
            return "mixed_bfloat16"
        return "mixed_float16" if oldest >= (7, 0) else "float32"
    flags = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
    return "mixed_bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


def compile_model(model: keras.Model, learning_rate: float, steps: int) -> None:
    """Set optimizer and loss for a training of this number of steps.

    The learning rate rises during the first tenth, then falls to 0 along a cosine.
    """
    warmup = int(WARMUP_FRACTION * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - warmup, warmup_target=learning_rate, warmup_steps=warmup
    )
    muon = Muon(schedule, weight_decay=WEIGHT_DECAY, adam_weight_decay=WEIGHT_DECAY)
    muon.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
    model.compile(
        muon, loss, metrics=["accuracy"], steps_per_execution=STEPS_PER_EXECUTION
    )


def make_model(args: argparse.Namespace, steps: int, dropout: float) -> keras.Model:
    """Build and compile the network for a training of this number of steps."""
    keras.utils.set_random_seed(args.seed)
    norm = functools.partial(FusedBatchNormalization, momentum=BATCH_MOMENTUM)
    keras.config.set_dtype_policy(args.precision)
    model = build_model(*network_shape(args), dropout=dropout, batch_normalization=norm)
    keras.config.set_dtype_policy("float32")
    if args.fine_tune:
        load_weights(model, args)
    rate = args.learning_rate * (FINE_TUNE_RATE_SCALE if args.fine_tune else 1)
    compile_model(model, rate, steps)
    return model


def network_shape(args: argparse.Namespace) -> tuple:
    """Return the arguments of build_model that determine the shapes of its weights."""
    shape = IMAGE_SIZE, IMAGE_SIZE, 1
    return shape, len(args.classes), args.filters, args.dense_units


def read_widths(args: argparse.Namespace) -> None:
    """Take --filters and --dense-units from the model file to fine-tune.

    Its layers must be those of build_model.
    """
    weights = utils.load_model(Path(args.fine_tune)).weights
    try:
        # The first convolution is half as wide as the first block; blocks have two.
        widths = [kernel.shape[-1] for kernel in weights if kernel.ndim > 1]
        *convolutions, args.dense_units, _ = widths
        args.filters = convolutions[1::2]
        load_weights(build_model(*network_shape(args)), args)
    except (ValueError, IndexError) as error:
        message = f"{args.fine_tune}: its layers differ from build_model's"
        raise UserError(message) from error


def load_weights(model: keras.Model, args: argparse.Namespace) -> None:
    """Load the weights of the model file to fine-tune into a network.

    The output layer stays new if that file has other classes.
    """
    network = utils.load_model(Path(args.fine_tune))
    weights = network.weights
    if network.class_names != args.classes:
        weights[-2:] = model.get_weights()[-2:]
    model.set_weights(weights)


# --- Training ---
class Checkpoint(keras.callbacks.Callback):
    """Save everything that a run needs to continue, in one file, after each epoch.

    Keras' BackupAndRestore writes several files, and a kill may come between them.
    """

    def __init__(self, path: Path, model: keras.Model, arguments: dict) -> None:
        super().__init__()
        self.set_model(model)
        self.path, self.arguments = path, arguments
        self.history: list[dict[str, float]] = []  # one row per epoch

    def variables(self) -> list[keras.Variable]:
        """List all that training changes: weights, statistics, optimizer, seeds."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def load(self) -> None:
        """Continue an unfinished run, which must have the same arguments."""
        try:
            with np.load(self.path) as file:
                about = json.loads(str(file["about"]))
                begun, self.history = about["arguments"], about["history"]
                state = [file[str(i)] for i in range(len(file.files) - 1)]
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            message = f"{self.path}: not a checkpoint; discard it with --restart"
            raise UserError(message) from error
        for name, value in self.arguments.items():
            if begun.get(name) != value:
                different = f"{name} {begun.get(name)}, not {value}"
                then = "use the same, or discard it with --restart"
                raise UserError(f"{self.path}: was begun with {different}; {then}")
        self.model.optimizer.build(self.model.trainable_variables)
        try:
            for variable, value in zip(self.variables(), state, strict=True):
                variable.assign(value)
        except ValueError as error:
            then = "belongs to another network; discard it with --restart"
            raise UserError(f"{self.path}: {then}") from error

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Replace the checkpoint."""
        if not np.isfinite(list(logs.values())).all():
            rate = self.arguments["learning_rate"]
            then = f"begin again with --restart and a --learning-rate below {rate:g}"
            raise UserError(
                f"epoch {epoch + 1}: the loss became infinite or NaN; {then}"
            )
        self.history.append({name: float(value) for name, value in logs.items()})
        about = {"arguments": self.arguments, "history": self.history}
        values = map(keras.ops.convert_to_numpy, self.variables())
        arrays = {str(i): value for i, value in enumerate(values)}
        with utils.atomic_write(self.path) as new:
            np.savez(new, about=json.dumps(about), **arrays)


def checkpoint_path(model_path: Path) -> Path:
    """Return the path of a model's checkpoint."""
    return model_path.with_suffix(".checkpoint.npz")


def list_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments that shape a training, without paths to data and model."""
    others = "data_dir", "model_path", "resume", "restart"
    return {name: value for name, value in vars(args).items() if name not in others}


def fit(
    train: Split, validation: Split, args: argparse.Namespace
) -> tuple[keras.Model, pd.DataFrame]:
    """Train; return the network in float32, and its history, a row per epoch."""
    train_iterator, validation_iterator = make_iterators(train, validation, args)
    steps = args.epochs * len(train_iterator)
    dropout = choose_regularization(args, len(train.table))["dropout"]
    plain_model = build_model(*network_shape(args))
    check_saving(plain_model, args)
    model = make_model(args, steps, dropout)
    path = checkpoint_path(args.model_path)
    hashes = pd.util.hash_pandas_object(train.table[["emotion", "digest"]], index=False)
    arguments = list_arguments(args) | {"images": str(hashes.sum())}
    checkpoint = Checkpoint(path, model, arguments)
    if args.resume:
        checkpoint.load()
        print(f"Resumed after epoch {len(checkpoint.history)} of {args.epochs}.")
    else:
        path.unlink(missing_ok=True)
    plain_model.summary()
    print(f"{len(tf.config.list_physical_devices('GPU'))} GPUs, {args.precision}")
    model.fit(
        train_iterator,
        initial_epoch=len(checkpoint.history),
        epochs=args.epochs,
        validation_data=validation_iterator,
        callbacks=[train_iterator.follow_epochs(), checkpoint],
        shuffle=False,  # the iterator shuffles; Keras would do so again
        verbose=1 if sys.stdout.isatty() else 2,
    )
    plain_model.set_weights(model.get_weights())
    epochs = pd.RangeIndex(1, args.epochs + 1, name="epoch")
    return plain_model, pd.DataFrame(checkpoint.history, index=epochs)


# --- Model file, calibration, evaluation ---
def check_saving(model: keras.Model, args: argparse.Namespace) -> None:
    """Save and load the untrained network, so that no training ends in a failure."""
    about = {"class_names": args.classes, "rescale": RESCALE}
    with tempfile.TemporaryDirectory(dir=args.model_path.parent) as folder:
        path = Path(folder) / "model.h5"
        save_model(model, path, about)
        try:
            utils.load_model(path)
        except UserError as error:
            raise UserError(f"build_model: {error.__cause__}") from error


def save_model(model: keras.Model, path: Path, about: dict[str, Any]) -> None:
    """Write a model file: network, weights, and each value of about as JSON.

    Keras ignores the root attributes in which about is stored.
    """
    # HDF5 does not end well on a full disk: find out first whether everything fits.
    path.write_bytes(os.urandom(4 * model.count_params() + utils.MAX_ATTRIBUTE))
    logging.getLogger("absl").setLevel(logging.ERROR)  # "HDF5 is considered legacy"
    model.save(path, include_optimizer=False)
    with h5py.File(path, "r+") as file:
        for name, value in about.items():
            file.attrs[name] = json.dumps(value)


def describe_run(args: argparse.Namespace, splits: Splits) -> dict[str, Any]:
    """Collect what the model file says about its training, without paths."""
    return {
        "class_names": args.classes,
        "image_size": IMAGE_SIZE,
        "rescale": RESCALE,
        "arguments": list_arguments(args) | {"fine_tune": bool(args.fine_tune)},
        "images": {name: len(split.table) for name, split in splits.items()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (tf, keras, np)},
        "temperature": None,
    }


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Make probabilities less confident, if temperature > 1 (Guo et al. 2017)."""
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return softmax(logs / temperature, axis=1)


def fit_temperature(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the temperature with the smallest Brier score (Brier 1950).

    Cross-entropy would give most weight to the most confident answers, and leave the
    others overconfident. Probabilities have shape (n, num_classes), labels (n,).
    """
    truth = np.eye(probabilities.shape[1])[labels]

    def brier_score(temperature: float) -> float:
        difference = apply_temperature(probabilities, temperature) - truth
        return (difference**2).sum(axis=1).mean()

    return float(minimize_scalar(brier_score, bounds=(0.1, 10), method="bounded").x)


def calibrate(model: keras.Model, network: utils.Network, validation: Split) -> float:
    """Fit the temperature, divide the output layer's weights by it, and return it."""
    probabilities = utils.predict_split(network, validation)
    temperature = fit_temperature(probabilities, validation.labels)
    layer = model.layers[-1]
    layer.set_weights([weights / temperature for weights in layer.get_weights()])
    return temperature


def write_results(
    model: keras.Model, history: pd.DataFrame, splits: Splits, args: argparse.Namespace
) -> dict[str, Any]:
    """Write and evaluate the model file; return its metrics, as in metrics.json.

    The model file is put in place last, so that a run that is stopped here can resume.
    The model file that it replaces becomes <name>.previous.h5.
    """
    folder, about = args.model_path.parent, describe_run(args, splits)
    with utils.atomic_write(args.model_path) as new_model:
        save_model(model, new_model, about)
        if "validation" in splits:
            network = utils.load_model(new_model)
            about["temperature"] = calibrate(model, network, splits["validation"])
            save_model(model, new_model, about)
        metrics = about | utils.evaluate(utils.load_model(new_model), splits["test"])
        save_model(model, new_model, metrics)
        with utils.atomic_write(folder / "history.csv") as file:
            history.to_csv(file, lineterminator="\n")
        with utils.atomic_write(folder / "metrics.json") as file:
            file.write_text(json.dumps(metrics, indent=2) + "\n", newline="\n")
        write_figures(history, splits, metrics["test"], args)
        old = args.model_path
        # If they are equal, a kill came after the replacement: keep the previous one.
        if old.exists() and not filecmp.cmp(old, new_model, shallow=False):
            with utils.atomic_write(old.with_suffix(".previous.h5")) as file:
                shutil.copyfile(old, file)
    return metrics


# --- Plots ---
def write_figures(
    history: pd.DataFrame, splits: Splits, metrics: dict, args: argparse.Namespace
) -> None:
    """Plot the data, the training and the test."""
    train = splits["train"]
    with utils.naming_classes(args.classes) as names:
        figures = {
            "learning_curves.png": plot_learning_curves(history, splits),
            "confusion_matrix.png": utils.plot_confusion_matrix(metrics, names),
            "reliability.png": plot_reliability(metrics),
            "class_distribution.png": plot_class_distribution(splits, names),
            "example_images.png": plot_example_images(train, names, args.seed),
        }
        for name, figure in figures.items():
            with utils.atomic_write(args.model_path.with_name(name)) as file:
                figure.savefig(file, dpi=120)


def plot_learning_curves(history: pd.DataFrame, splits: Splits) -> Figure:
    """Plot loss and accuracy of every epoch."""
    labels = ["train, augmented", "validation" if "validation" in splits else "test"]
    figure = Figure(figsize=(10, 4), layout="constrained")  # pyplot opens windows
    axes = figure.subplots(1, 2)
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        history[[metric, f"val_{metric}"]].plot(ax=axis, marker="o")
        axis.legend(labels)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(title="Loss", ylabel="cross-entropy, smoothed labels (nats)")
    axes[1].set(title="Accuracy", ylabel="images classified right")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_reliability(metrics: dict) -> Figure:
    """Plot accuracy against confidence, in 15 bins."""
    bins = pd.DataFrame(metrics["reliability"])
    shown = bins[bins.images > 0]
    figure = Figure(figsize=(6, 7), layout="constrained")
    axis, counts = figure.subplots(2, height_ratios=[3, 1], sharex=True)
    axis.plot([0, 1], [0, 1], color="gray", linestyle="--", label="perfect")
    axis.plot(shown.confidence, shown.accuracy, marker="o", label="this model")
    axis.set(title="Reliability, all test images", ylabel="images classified right")
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend()
    edges = np.arange(len(bins)) / len(bins)
    counts.bar(edges, bins.images, 1 / len(bins), align="edge", edgecolor="white")
    counts.set(xlabel="confidence", ylabel="images", xlim=(0, 1))
    counts.xaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_class_distribution(splits: Splits, class_names: Sequence[str]) -> Figure:
    """Plot the number of images of each class."""
    images = {name: np.bincount(split.labels) for name, split in splits.items()}
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = pd.DataFrame(images, class_names).plot.bar(ax=figure.subplots(), rot=0)
    for bars in axis.containers:
        axis.bar_label(bars, fontsize=8)
    axis.set(title="Images of each emotion", ylabel="images")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_example_images(train: Split, class_names: Sequence[str], seed: int) -> Figure:
    """Show eight training faces of each class, chosen at random, as one picture."""
    random, count = np.random.default_rng(seed), len(class_names)
    rows = [np.flatnonzero(train.labels == number) for number in range(count)]
    chosen = np.concatenate([np.resize(random.permutation(row), 8) for row in rows])
    tiles = train.take(chosen).reshape(count, 8, IMAGE_SIZE, IMAGE_SIZE)
    figure = Figure(figsize=(9, count + 0.5), layout="compressed")
    axis = figure.subplots()
    axis.imshow(np.block([list(row) for row in tiles]), cmap="gray", vmin=0, vmax=255)
    axis.set(title="Training images, before augmentation", xticks=[])
    axis.set_yticks(IMAGE_SIZE * (np.arange(count) + 0.5), class_names)
    return figure


# --- The command ---
@contextlib.contextmanager
def lock_model(model_path: Path) -> Generator[None, None, None]:
    """Lock a model path and the files beside it, until the block or process ends."""
    is_new = not model_path.parent.exists()
    model_path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(model_path.with_suffix(".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{model_path}: another training is writing it") from error
    try:
        yield
    finally:
        with contextlib.suppress(PermissionError):  # Windows: release deletes it
            os.unlink(lock.lock_file)  # first, so that no other process gets it
        lock.release()
        if is_new:
            with contextlib.suppress(OSError):  # not empty
                model_path.parent.rmdir()


def run(args: argparse.Namespace) -> None:
    """Read the data, train, save, evaluate, and say what comes next."""
    begin, folder = time.monotonic(), args.model_path.parent
    if args.precision == "auto":
        args.precision = choose_precision()
    checkpoint = checkpoint_path(args.model_path)
    if args.resume and not checkpoint.exists():
        done = args.model_path.exists()
        hint = "; to go on from a finished one: --fine-tune" if done else ""
        raise UserError(f"{checkpoint}: no unfinished training to resume{hint}")
    if checkpoint.exists() and not (args.resume or args.restart):
        choices = "go on with --resume or discard it with --restart"
        raise UserError(f"{checkpoint}: an unfinished training; {choices}")
    written = [args.model_path.with_suffix(".previous.h5"), folder / "history.csv"]
    for path in filter(None, (args.data_dir, args.fine_tune)):
        if utils.is_target(path, written):
            raise UserError(f"{path}: would be overwritten; name another --model-path")
    if args.fine_tune:
        read_widths(args)
    splits = index_data(args)
    validation = splits.get("validation", splits["test"])
    model, history = fit(splits["train"], validation, args)
    metrics = write_results(model, history, splits, args)
    print(utils.describe_metrics(metrics, args.classes), end="")
    if temperature := metrics["temperature"]:
        print(f"Calibrated on the validation images: temperature {temperature:.2f}.")
    else:
        print("Not calibrated: that needs a --validation-split above 0.")
    minutes = (time.monotonic() - begin) / 60
    print(f"Done in {minutes:.1f} minutes. Model, figures, plots: {printable(folder)}")
    print(f"\nNow try: {printable(propose_command(args, splits['test']))}")
    checkpoint.unlink()  # last: until here, --resume works


def propose_command(args: argparse.Namespace, test: Split) -> str:
    """Return the command that classifies an image with the new model."""
    image = test.table.path.iloc[0]
    if args.data_dir.is_file():  # its images are lines, not files
        image = str(utils.of_project(DATA_DIR / "astronaut.jpg"))
    command = ["python", str(utils.of_project(Path("predict.py"))), "--image", image]
    if args.model_path != utils.of_project(utils.MODEL_PATH):
        command += ["--model", str(args.model_path)]
    return utils.join_command(command)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; expected failures end in one line and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # bad files are reported by name
    # Without a console (pythonw) there are no streams.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    # File names may hold any bytes, and logs should show each epoch when it ends.
    utils.reconfigure(sys.stdout, errors="backslashreplace", line_buffering=True)
    args = parse_args(argv)
    try:
        with lock_model(args.model_path):
            run(args)
    # "from None": notebooks would show the exception that ends in an exit.
    except UserError as error:
        raise SystemExit(f"train.py: error: {error}") from None
    except OSError as error:  # the disk is full, for example
        where = printable(args.model_path)
        raise SystemExit(f"train.py: error: {where}: {error}") from None
    except KeyboardInterrupt:
        kept = checkpoint_path(args.model_path).exists()
        then = "--resume continues the training" if kept else "no epoch was complete"
        print(f"train.py: stopped; {then}", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None


def leave(stop: SystemExit) -> None:
    """Exit at once: TensorFlow's threads can make Python's orderly exit abort."""
    if utils.is_interactive():
        raise stop
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    with contextlib.suppress(OSError):  # closed
        sys.stdout.flush()
    os._exit(1 if isinstance(stop.code, str) else stop.code or 0)


if __name__ == "__main__":
    matplotlib.use("agg")  # pandas loads the user's own, which may need a display
    try:
        main()
    except SystemExit as stop:
        leave(stop)
