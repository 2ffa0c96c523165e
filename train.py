"""Train a convolutional network that tells facial expressions apart.

    python train.py --epochs 15
    python train.py --epochs 15 --resume
    python train.py --data-dir data/demo --epochs 15 --model-path models/demo.h5

It reads data/train/<emotion>/ and data/test/<emotion>/ and writes the model file that
predict.py loads, with its figures and plots beside it. Each epoch leaves a checkpoint
there, from which --resume goes on.
"""

import argparse
import contextlib
import filecmp
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import signal
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from filelock import FileLock, Timeout
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import softmax

import utils
from utils import IMAGE_SIZE, RESCALE, WORKERS, Split, UserError, printable

with utils.starting_tensorflow():
    import keras
    import tensorflow as tf

    # Keras calls these two deprecated. They are used all the same: they work, and they
    # are what this field's users know and extend.
    from tensorflow.keras.preprocessing.image import ImageDataGenerator, Iterator

# The recipe.
CLASS_NAMES = ["angry", "fear", "happy", "neutral", "sad", "surprise"]
FILTERS = [32, 64, 128, 256]  # a block each: twice as wide, half as large
DENSE_UNITS = 256  # of the layer that sees the whole face
BATCH_SIZE = 128  # at most: large, since Muon's own work is done once a step
STEPS = 100  # in an epoch at least, so that small data sets get enough, too ...
SMALLEST_BATCH = 16  # ... but batches no smaller than batch normalization can bear
LEARNING_RATE = 0.006  # at its highest; steps are as large as AdamW's would be
FINE_TUNING = 1 / 6  # part of it that trained weights bear, and still forget little
WARMUP = 0.1  # part of all steps in which the learning rate rises from 0
WEIGHT_DECAY = 0.1  # of kernels, times the learning rate: old steps are forgotten
LABEL_SMOOTHING = 0.05  # people disagree about labels; 0.1 left answers too unsure
AVERAGED = 0.02  # part of all steps that moving averages look back on, against noise
# Regularization grows with the number of images that a run will see: a short run has
# more to learn than to forget. Between these lengths it is interpolated.
IMAGES_SEEN = [0, 425_000, 2_900_000]  # the last two: 15 and 102 epochs of FER2013
REGULARIZATION = {
    "dropout": [0, 0.4, 0.5],  # before each dense layer
    "rotation": [0, 12, 15],  # degrees to both sides
    "shift": [0, 0.12, 0.15],  # part of the image, in each direction
    "zoom": [0, 0.15, 0.2],  # part of the size, in and out
    "erasing": [0, 0.25, 0.45],  # probability (Zhong et al. 2017)
    "mixup": [0, 0, 0.3],  # alpha (Zhang et al. 2018): long runs learn wrong labels
}
STEPS_PER_EXECUTION = 8  # between two returns to Python, which cost time
AFFINE = {"theta": 0, "tx": 0, "ty": 0, "zx": 1, "zy": 1}  # what changes nothing
LAST_LAYER = "probabilities"  # its name, by which the optimizer knows it
PRECISIONS = ["float32", "mixed_bfloat16", "mixed_float16"]  # Keras policies
CPU_INFO = Path("/proc/cpuinfo")


GET_DATA = """. Get FER2013 with one of
  pip install kaggle && kaggle datasets download msambare/fer2013 --path data --unzip
  pip install kagglehub && python -c "import kagglehub; \
kagglehub.dataset_download('msambare/fer2013', output_dir='data')"
or try the drawn faces that are here already:
  python train.py --data-dir data/demo --epochs 15 --model-path models/demo.h5"""


def number(kind: type, low: float, high: float) -> Callable[[str], Any]:
    """Return a parser of numbers in [low, high]."""

    def number(text: str) -> Any:  # argparse puts its name into messages
        value = kind(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text} is not in [{low:g}, {high:g}]")
        return value

    return number


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with 2."""
    count = number(int, 1, float("inf"))
    parser = utils.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--epochs", type=count, default=10, help="passes over the training images")
    text = f"images a step, at most; fewer if an epoch had less than {STEPS} steps"
    add("--batch-size", type=count, default=BATCH_SIZE, help=text)
    rate = number(float, 1e-9, 1e3)
    text = "highest learning rate of the schedule; with --fine-tune a sixth of it"
    add("--learning-rate", type=rate, default=LEARNING_RATE, help=text)
    text = "folder that holds train/<emotion>/ and test/<emotion>/"
    add("--data-dir", type=Path, default=Path("data"), help=text)
    text = "the .h5 file to write; figures and plots go beside it"
    add("--model-path", type=Path, default=utils.MODEL_PATH, help=text)
    text = "same seed, same batches; on one CPU also the same weights"
    add("--seed", type=number(int, 0, 2**32 - 1), default=1, help=text)
    text = "width of each block of two convolutions; each block halves the image"
    add("--filters", type=count, nargs="+", default=FILTERS, help=text)
    text = "width of the dense layer before the last"
    add("--dense-units", type=count, default=DENSE_UNITS, help=text)
    text = "folders to tell apart, in the order of the network's outputs"
    add("--classes", nargs="+", default=CLASS_NAMES, help=text)
    text = "part of train/ to hold out and watch in place of test/"
    fraction = number(float, 0, 0.9)
    add("--validation-split", type=fraction, default=0.0, help=text)
    text = "what to calculate in; auto: the fastest that the machine has hardware for"
    add("--precision", choices=["auto", *PRECISIONS], default="auto", help=text)
    text = "model file whose network to go on with, in place of a new one"
    add("--fine-tune", metavar="MODEL", help=text)
    group = parser.add_mutually_exclusive_group()
    text = "go on with the unfinished training of this model path"
    group.add_argument("--resume", action="store_true", help=text)
    text = "throw the unfinished training of this model path away"
    group.add_argument("--restart", action="store_true", help=text)
    args = parser.parse_args(argv)
    if args.model_path.suffixes[-2:] == [".weights", ".h5"]:
        parser.error("--model-path: Keras keeps .weights.h5 for weights alone")
    if args.model_path.suffix != ".h5":
        parser.error(f"--model-path must end in .h5: {args.model_path}")
    if not utils.are_class_names(args.classes):
        parser.error("--classes needs two or more different names that can be printed")
    if IMAGE_SIZE >> len(args.filters) < 1:
        parser.error(
            f"--filters: {len(args.filters)} blocks leave nothing of the image"
        )
    if args.fine_tune:
        if (args.filters, args.dense_units) != (FILTERS, DENSE_UNITS):
            parser.error(
                "--fine-tune goes on with the network that its model file holds: leave "
                "--filters and --dense-units out"
            )
        args.filters = args.dense_units = None
    return args


def split_validation(split: Split, fraction: float) -> tuple[Split, Split]:
    """Split images at random, every emotion alike, equal images on one side.

    The same images always give the same parts, whatever --seed is, and a larger
    fraction holds a smaller one: what one training held out, another that goes on from
    it must not learn.

    Returns:
        The part to train on, and about the given fraction to validate on.

    Raises:
        UserError: if a part would lack an emotion.
    """
    table = split.table.drop_duplicates("digest").groupby("emotion", observed=False)
    chosen = table.sample(frac=fraction, random_state=1).digest
    held_out = split.table.digest.isin(chosen)
    parts = split.select(~held_out), split.select(held_out)
    if any(part.table.emotion.value_counts().min() == 0 for part in parts):
        raise UserError(
            f"--validation-split {fraction:g}: too few images of an emotion"
        )
    return parts


def describe_data(splits: dict[str, Split], unreadable: dict[str, list[str]]) -> None:
    """Print how many images there are, stand there repeatedly, or were left out."""
    tables = {name: split.table for name, split in splits.items()}
    counts = {name: table.emotion.value_counts() for name, table in tables.items()}
    shown = pd.DataFrame(counts).rename(index=str).rename_axis(index=None)
    shown.loc["all"] = shown.sum()
    shown.loc["repeated"] = [t.digest.duplicated().sum() for t in tables.values()]
    shown.loc["also in train"] = [
        table.in_train.sum() if name == "test" else 0 for name, table in tables.items()
    ]
    shown.loc["left out"] = [len(unreadable.get(name, [])) for name in tables]
    print(f"\n{shown.to_string()}\n")
    for name, lines in unreadable.items():
        for line in lines[:5]:
            print(f"left out: {printable(line)}")
        if len(lines) > 5:
            print(f"left out: {len(lines) - 5} more in {name}")


class FaceGenerator(ImageDataGenerator):
    """Keras' ImageDataGenerator; Pillow rotates, shifts and zooms in SciPy's place.

    The results are the same, in half the time.
    """

    def apply_transform(self, x: np.ndarray, transform_parameters: dict) -> np.ndarray:
        """Transform a face, float32 of shape (size, size, 1)."""
        rest = AFFINE | transform_parameters
        if self.fill_mode != "nearest" or rest.get("shear"):
            return super().apply_transform(x, transform_parameters)
        theta, tx, ty, zx, zy = (rest.pop(name) for name in AFFINE)
        cos, sin = math.cos(math.radians(theta)), math.sin(math.radians(theta))
        half = len(x) / 2
        # Pillow leaves black what lies outside: so give it a border, as wide as needed.
        reach = half * max(zx, zy) * (abs(cos) + abs(sin)) + abs(tx) + abs(ty)
        border = math.ceil(max(0, reach - half)) + 1
        edge = np.clip(np.arange(-border, len(x) + border), 0, len(x) - 1)
        image = Image.fromarray(x[..., 0].take(edge, 0).take(edge, 1))
        a, b, d, e = zx * cos, -zy * sin, zx * sin, zy * cos
        c = cos * tx - sin * ty + half + border - half * (a + b)
        f = sin * tx + cos * ty + half + border - half * (d + e)
        image = image.transform(
            x.shape[:2],
            Image.Transform.AFFINE,
            (a, b, c, d, e, f),  # from a place in the result to its origin
            Image.Resampling.BILINEAR,
        )
        return super().apply_transform(np.asarray(image)[..., np.newaxis], rest)


class FaceIterator(Iterator):
    """Stream the images of an index through an ImageDataGenerator, batch by batch.

    Shuffled, for training, it gives whole batches only; in order, it gives every image.
    A batch depends on seed, epoch and its number, not on the threads that ask for it.
    """

    def __init__(
        self,
        split: Split,
        generator: ImageDataGenerator,
        batch_size: int,
        shuffle: bool,
        seed: int,
        erasing: float = 0,
        mixup: float = 0,
        workers: int = WORKERS,
    ) -> None:
        # More than one worker also makes Keras switch off tf.data's autotune, which
        # can hold up the end of an epoch by many seconds.
        super().__init__(len(split.table), batch_size, shuffle, seed, workers=workers)
        self.split, self.generator = split, generator
        self.labels = split.labels
        self.num_classes = len(split.table.emotion.cat.categories)
        self.erasing, self.mixup = erasing, mixup
        self.set_epoch(0)

    def __len__(self) -> int:
        """Count the batches of an epoch."""
        return max(1, self.n // self.batch_size) if self.shuffle else super().__len__()

    def __getitem__(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return faces (n, 48, 48, 1) in [0, 1] and class shares (n, num_classes)."""
        rows = self.index_array[batch * self.batch_size :][: self.batch_size]
        faces = self.split.faces(rows)
        labels = np.eye(self.num_classes, dtype=np.float32)[self.labels[rows]]
        with self.lock:  # the parameters come from NumPy's one global generator
            np.random.seed([self.seed, self.epoch, batch])
            parameters = [self.generator.get_random_transform(x.shape) for x in faces]
        random = np.random.default_rng([self.seed, self.epoch, batch])
        for face, transform in zip(faces, parameters, strict=True):
            face[:] = self.generator.apply_transform(face, transform)
            face[:] = self.generator.standardize(face)
            if random.random() < self.erasing:
                erase(face, random)
        if self.mixup:
            own = random.beta(self.mixup, self.mixup, (len(rows), 1)).astype("float32")
            labels = mix(labels, own)
            faces = mix(faces, own[..., None, None])
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
        """Change nothing: Keras calls this once too often to count epochs by it."""


def erase(face: np.ndarray, random: np.random.Generator) -> None:
    """Fill a rectangle of a face, an eighth to half as wide and high, with noise."""
    height, width = random.integers(IMAGE_SIZE // 8, IMAGE_SIZE // 2, 2, endpoint=True)
    top = random.integers(IMAGE_SIZE - height, endpoint=True)
    left = random.integers(IMAGE_SIZE - width, endpoint=True)
    noise = random.random((height, width, 1), np.float32)
    face[top : top + height, left : left + width] = noise


def mix(values: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Mix what each image has with its neighbour's, of which it keeps its own share."""
    return own * values + (1 - own) * np.roll(values, 1, axis=0)


def choose_precision() -> str:
    """Name the Keras policy that is fastest on this machine's own hardware.

    GPUs calculate in bfloat16 from compute capability 8.0 on, in float16 from 7.0 on.
    Processors without bfloat16 instructions imitate it, slower than float32.
    """
    if gpus := tf.config.list_physical_devices("GPU"):
        details = map(tf.config.experimental.get_device_details, gpus)
        oldest = min(detail.get("compute_capability", (0, 0)) for detail in details)
        if oldest >= (8, 0):
            return "mixed_bfloat16"
        return "mixed_float16" if oldest >= (7, 0) else "float32"
    flags = set(CPU_INFO.read_text().split()) if CPU_INFO.exists() else set()
    return "mixed_bfloat16" if flags & {"avx512_bf16", "amx_bf16"} else "float32"


@keras.saving.register_keras_serializable()  # clone_model asks for it
class Muon(keras.optimizers.Muon):
    """Muon (Jordan et al. 2024) for the kernels of convolutions, too.

    It moves a matrix of weights by an orthogonal one, in all directions alike. Keras'
    own does so with dense layers alone, and leaves the rest to AdamW; here that is the
    rest: gamma, beta, and the last layer. Products are calculated in matrix_dtype.
    """

    matrix_dtype = "float32"

    def _should_use_adamw(self, variable: keras.Variable) -> bool:
        return len(variable.shape) < 2 or LAST_LAYER in variable.path

    def zeropower_via_newtonschulz5(self, x: tf.Tensor, steps: int) -> tf.Tensor:
        """Return the orthogonal matrix next to a kernel (..., filters), as a step.

        It is as large as a step of AdamW would be (Liu et al. 2025).
        """
        matrix = tf.cast(tf.reshape(x, (-1, x.shape[-1])), self.matrix_dtype)
        step = super().zeropower_via_newtonschulz5(matrix, steps)
        step = 0.2 * max(matrix.shape) ** 0.5 * tf.cast(step, x.dtype)
        return tf.reshape(step, x.shape)


class FusedBatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization that trains in one kernel, in the precision of its input.

    Keras' own is a dozen operations in float32, which cost time at each pixel. Both
    compute the same, but for the moving variance, which is the unbiased one here.
    """

    def call(
        self, inputs: tf.Tensor, training: bool | None = None, mask: None = None
    ) -> tf.Tensor:
        """Normalize inputs of shape (n, height, width, channels)."""
        if not training:
            return super().call(inputs, training=training, mask=mask)
        outputs, mean, variance = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon
        )
        kept, new = self.momentum, 1 - self.momentum
        self.moving_mean.assign(kept * self.moving_mean + new * mean)
        self.moving_variance.assign(kept * self.moving_variance + new * variance)
        return outputs


def build_model(
    input_shape: tuple[int, int, int],
    num_classes: int,
    filters: Sequence[int] = tuple(FILTERS),
    dense_units: int = DENSE_UNITS,
) -> keras.Sequential:
    """Build the network: a convolution, blocks of two more each, then two dense layers.

    Each image is first brought to mean 0 and variance 1 (as the only group): light and
    contrast tell nothing about a face. A convolution, half as wide as the first block,
    sees the image as it is. A block pools right after its first convolution, so that
    all behind it works on a quarter of the pixels. SiLU (Elfwing et al. 2018) takes a
    little longer than ReLU, and tells more of new faces.
    """
    layers = keras.layers

    def convolve(width: int, *pool: keras.Layer) -> list[keras.Layer]:
        conv = {"padding": "same", "use_bias": False, "kernel_initializer": "he_normal"}
        return [
            layers.Conv2D(width, 3, **conv),
            *pool,
            layers.BatchNormalization(),
            layers.Activation("silu"),
        ]

    convolutions = convolve((filters[0] + 1) // 2)
    for width in filters:
        convolutions += convolve(width, layers.MaxPooling2D()) + convolve(width)
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.GroupNormalization(1, center=False, scale=False),
            *convolutions,
            layers.Flatten(),
            layers.Dropout(0),
            layers.Dense(dense_units, use_bias=False),
            layers.BatchNormalization(),
            layers.Activation("silu"),
            layers.Dropout(0),
            answer(num_classes),
        ],
        name="face_classifier",
    )


def answer(num_classes: int) -> keras.Layer:
    """Make the layer that says how probable each class is."""
    return keras.layers.Dense(num_classes, activation="softmax", name=LAST_LAYER)


def make_network(args: argparse.Namespace) -> keras.Model:
    """Build a network, or load the one to fine-tune.

    The latter gets a new last layer if its file tells other classes apart.

    Raises:
        UserError: if the file cannot be loaded, or ends in another layer than answer's.
    """
    if not args.fine_tune:
        shape = IMAGE_SIZE, IMAGE_SIZE, 1
        return build_model(shape, len(args.classes), args.filters, args.dense_units)
    model, class_names = utils.load_model(Path(args.fine_tune))
    last = {"name": LAST_LAYER, "activation": "softmax", "use_bias": True}
    if not last.items() <= model.layers[-1].get_config().items():
        raise UserError(
            f"{args.fine_tune}: it does not end in train.py's layer {LAST_LAYER}"
        )
    if class_names == args.classes:
        return model
    features = model.layers[-1].input
    return keras.Model(model.inputs[0], answer(len(args.classes))(features))


def copy_network(
    model: keras.Model, change: Callable[[keras.Layer], keras.Layer]
) -> keras.Model:
    """Copy a network with its weights, each layer as change makes it anew."""
    copy = keras.models.clone_model(model, clone_function=change)
    copy.set_weights(model.get_weights())
    return copy


def to_training(
    model: keras.Model, precision: str, dropout: float, momentum: float
) -> keras.Model:
    """Copy a network of Keras' own layers in float32 into one that trains fast.

    First and last layer keep float32. Momentum is that of batch normalization's moving
    averages.
    """

    def trained(layer: keras.Layer) -> keras.Layer:
        kind, config = type(layer), layer.get_config() | {"dtype": precision}
        if kind is keras.layers.GroupNormalization or layer.name == LAST_LAYER:
            config["dtype"] = "float32"
        if kind is keras.layers.Dropout:
            config["rate"] = dropout
        if kind is keras.layers.BatchNormalization:
            config["momentum"] = momentum
            if len(layer.input.shape) == 4:
                kind = FusedBatchNormalization
        return kind.from_config(config)

    copy = copy_network(model, trained)
    copy.dtype_policy = precision  # from which compile tells how to scale the loss
    return copy


def to_float32(model: keras.Model) -> keras.Model:
    """Copy a network into Keras' own layers in float32, as the model file holds it."""

    def plain(layer: keras.Layer) -> keras.Layer:
        fused = isinstance(layer, FusedBatchNormalization)
        kind = keras.layers.BatchNormalization if fused else type(layer)
        return kind.from_config(layer.get_config() | {"dtype": "float32"})

    return copy_network(model, plain)


def compile_model(
    model: keras.Model, learning_rate: float, steps: int, momentum: float
) -> None:
    """Set optimizer and loss for a training of so many steps.

    The learning rate rises for a tenth of them, then falls to 0 along a cosine.
    Momentum is that of the weights' moving average, which replaces them at the end.
    """
    warmup_steps = int(WARMUP * steps)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0,
        steps - warmup_steps,
        warmup_target=learning_rate,
        warmup_steps=warmup_steps,
    )
    optimizer = Muon(
        schedule,
        weight_decay=WEIGHT_DECAY,
        adam_weight_decay=WEIGHT_DECAY,
        rms_rate=None,
        use_ema=True,
        ema_momentum=momentum,
    )
    if model.compute_dtype == "bfloat16":
        optimizer.matrix_dtype = "bfloat16"
    optimizer.exclude_from_weight_decay(var_names=["gamma", "beta", "bias"])
    loss = keras.losses.CategoricalCrossentropy(label_smoothing=LABEL_SMOOTHING)
    # Keras 3.15 cannot run several steps in one execution on several devices.
    devices = tf.distribute.get_strategy().num_replicas_in_sync
    model.compile(
        optimizer,
        loss,
        metrics=["accuracy"],
        steps_per_execution=STEPS_PER_EXECUTION if devices == 1 else 1,
    )


class Checkpoint(keras.callbacks.Callback):
    """Keep after each epoch all that a run needs to go on, in one file.

    Keras' own BackupAndRestore writes several, and a kill may come between them.
    Settings are what a resumed run must have in common with the one that began.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        super().__init__()
        self.path, self.settings = path, settings
        self.history: list[dict[str, float]] = []  # a row an epoch
        self.state: list[np.ndarray] = []

    def load(self) -> None:
        """Read the file that an unfinished run left.

        Raises:
            UserError: if it cannot be read, or other settings began it.
        """
        about, self.state = read_checkpoint(self.path)
        self.history, begun = about["history"], about["settings"]
        differences = [
            "other images"
            if name == "images"
            else f"--{name.replace('_', '-')} {begun.get(name)}, not {value}"
            for name, value in self.settings.items()
            if begun.get(name) != value
        ]
        if differences:
            raise UserError(
                f"{self.path}: begun with {'; '.join(differences)}. "
                "Use the same settings, or throw it away: --restart"
            )

    def variables(self) -> list[keras.Variable]:
        """List all that changes in training: weights, statistics, optimizer, seeds."""
        return [*self.model.variables, *self.model.optimizer.variables]

    def on_train_begin(self, logs: dict | None = None) -> None:
        """Put the state that was loaded into the network and its optimizer."""
        if not self.state:
            return
        self.model.optimizer.build(self.model.trainable_variables)
        variables = self.variables()
        if [v.shape for v in variables] != [value.shape for value in self.state]:
            raise UserError(
                f"{self.path}: begun with another network. Throw it away: --restart"
            )
        for variable, value in zip(variables, self.state, strict=True):
            variable.assign(value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Write the file anew.

        Raises:
            UserError: if the loss is infinite or NaN, or the file cannot be written.
        """
        if not np.isfinite(list(logs.values())).all():
            raise UserError(
                f"epoch {epoch + 1}: the loss is no number any more; lower "
                f"--learning-rate ({self.settings['learning_rate']:g}) and begin anew: "
                "--restart"
            )
        self.history.append({name: float(value) for name, value in logs.items()})
        about = {"settings": self.settings, "history": self.history}
        values = map(keras.ops.convert_to_numpy, self.variables())
        arrays = {str(i): value for i, value in enumerate(values)}
        try:
            with utils.replacing(self.path) as new:
                np.savez(new, about=json.dumps(about), **arrays)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write there: {error}") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Read a checkpoint: what it tells (settings, history), and every variable.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with np.load(path) as file:
            about = json.loads(str(file["about"]))
            return about, [file[str(i)] for i in range(len(file.files) - 1)]
    except (
        OSError,
        EOFError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"{path}: not a checkpoint: {error}. Throw it away: --restart"
        ) from error


def checkpoint_path(model_path: Path) -> Path:
    """Name the checkpoint of a model."""
    return model_path.with_suffix(".checkpoint.npz")


def describe_settings(
    args: argparse.Namespace, train: Split, watched: Split
) -> dict[str, Any]:
    """Collect what a resumed run must have in common with the one that began."""
    apart = "data_dir", "model_path", "resume", "restart"
    digest = hashlib.blake2b(digest_size=8)
    for part in (train, watched):
        digest.update(part.labels)
        digest.update(part.table.digest.to_numpy())
    settings = {name: value for name, value in vars(args).items() if name not in apart}
    return settings | {"images": digest.hexdigest()}


def regularize(images_seen: float) -> dict[str, float]:
    """Return the strength of each regularization for a run of this length."""
    return {
        name: float(np.interp(images_seen, IMAGES_SEEN, strengths))
        for name, strengths in REGULARIZATION.items()
    }


def choose_strength(args: argparse.Namespace, images: int) -> dict[str, float]:
    """Return the strength of each regularization for a run on so many images.

    Trained weights have seen many images before: they get what a long run does. But a
    few epochs refine best on unmixed images (He et al. 2019, arXiv:1909.09148).
    """
    seen = args.epochs * images
    if not args.fine_tune:
        return regularize(seen)
    strength = regularize(np.inf)
    return strength if seen >= IMAGES_SEEN[1] else strength | {"mixup": 0.0}


def make_generators(
    train: Split, watched: Split, args: argparse.Namespace
) -> tuple[FaceIterator, FaceIterator]:
    """Stream the part to train on augmented, the watched one as it is."""
    images = len(train.table)
    strength = choose_strength(args, images)
    augmented = FaceGenerator(
        horizontal_flip=True,
        rotation_range=strength["rotation"],
        width_shift_range=strength["shift"],
        height_shift_range=strength["shift"],
        zoom_range=strength["zoom"],
    )
    others = {name: strength[name] for name in ("erasing", "mixup")}
    size = min(args.batch_size, max(SMALLEST_BATCH, images // STEPS))
    return (
        FaceIterator(train, augmented, size, True, args.seed, **others),
        FaceIterator(watched, ImageDataGenerator(), size, False, args.seed),
    )


def make_model(args: argparse.Namespace, steps: int, dropout: float) -> keras.Model:
    """Build and compile the network for a training of so many steps, on all GPUs."""
    keras.utils.set_random_seed(args.seed)
    network = make_network(args)
    momentum = max(0, 1 - 1 / (AVERAGED * steps))  # 0.99 averages the last 100 steps
    several = len(tf.config.list_logical_devices("GPU")) > 1
    strategy = tf.distribute.MirroredStrategy if several else tf.distribute.get_strategy
    with strategy().scope():
        model = to_training(network, args.precision, dropout, min(0.99, momentum))
        rate = args.learning_rate * (FINE_TUNING if args.fine_tune else 1)
        compile_model(model, rate, steps, momentum)
    return model


def check_network(model: keras.Model) -> None:
    """Make sure that the model file can be loaded once it is written.

    Raises:
        UserError: if build_model was given layers that utils.load_model refuses.
    """
    try:
        config = json.loads(to_float32(model).to_json())
        utils.build_from_config(config, (utils.MAX_BYTES - utils.MAX_ATTRIBUTE) // 4)
    except ValueError as error:
        raise UserError(f"the network would not be loaded again: {error}") from error


def fit(
    train: Split, watched: Split, args: argparse.Namespace
) -> tuple[keras.Model, pd.DataFrame]:
    """Train a new network, watching another part's images after each epoch.

    Returns:
        The network with the averaged weights of the last epoch, in float32, and the
        history: loss, accuracy, val_loss and val_accuracy of each epoch, from 1 on.

    Raises:
        UserError: if the network has layers that cannot be loaded, or the file to
            fine-tune cannot; if the loss becomes infinite or NaN; if the checkpoint
            cannot be written, or the one to resume does not fit; if memory does not
            suffice.
    """
    path = checkpoint_path(args.model_path)
    checkpoint = Checkpoint(path, describe_settings(args, train, watched))
    if args.resume:
        checkpoint.load()
        print(f"Resumed after epoch {len(checkpoint.history)} of {args.epochs}.")
    train_generator, validation_generator = make_generators(train, watched, args)
    steps = args.epochs * len(train_generator)
    dropout = choose_strength(args, len(train.table))["dropout"]
    model = make_model(args, steps, dropout)
    check_network(model)
    if not args.resume:
        path.unlink(missing_ok=True)
    model.summary()
    gpus = len(tf.config.list_physical_devices("GPU"))
    print(
        f"TensorFlow {tf.__version__}, Keras {keras.__version__}, "
        f"{gpus} GPUs, {args.precision}"
    )
    try:
        model.fit(
            train_generator,
            initial_epoch=len(checkpoint.history),
            epochs=args.epochs,
            validation_data=validation_generator,
            callbacks=[
                keras.callbacks.SwapEMAWeights(),  # what is watched will be saved
                train_generator.follow_epochs(),
                keras.callbacks.TerminateOnNaN(),
                checkpoint,
            ],
            shuffle=False,  # the iterator does; Keras would reorder the batches again
            verbose=1 if sys.stdout.isatty() else 2,
        )
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        message = f"out of memory: lower --batch-size ({args.batch_size}) or --filters"
        raise UserError(message) from error
    epochs = pd.RangeIndex(1, args.epochs + 1, name="epoch")
    return to_float32(model), pd.DataFrame(checkpoint.history, index=epochs)


def describe_run(args: argparse.Namespace, splits: dict[str, Split]) -> dict:
    """Collect what the model file tells about itself; no absolute paths.

    A resumed run tells the same as one left alone.
    """
    apart = "resume", "restart"
    arguments = {name: value for name, value in vars(args).items() if name not in apart}

    def without_folder(name: str | Path) -> str:
        path = Path(name)
        return path.name if path.is_absolute() else path.as_posix()

    for name in ("data_dir", "model_path", "fine_tune"):
        if arguments[name] is not None:
            arguments[name] = without_folder(arguments[name])
    return {
        "class_names": args.classes,
        "image_size": IMAGE_SIZE,
        "color_mode": "grayscale",
        "rescale": RESCALE,
        "script": Path(__file__).name,
        "arguments": arguments,
        "seed": args.seed,
        "images": {name: len(split.table) for name, split in splits.items()},
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (tf, keras, np)},
    }


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean squared distance of probabilities from the truth, in [0, 2].

    Brier 1950. Probabilities have shape (n, num_classes), class indices (n,).
    """
    truth = np.eye(probabilities.shape[1])[labels]
    return ((probabilities - truth) ** 2).sum(axis=1).mean()


def temper(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Make probabilities, shape (n, num_classes), less sure; or surer, below 1.

    None changes which answer comes first (Guo et al. 2017).
    """
    logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
    return softmax(logs / temperature, axis=1)


def fit_temperature(
    probabilities: np.ndarray,
    labels: np.ndarray,
    score: Callable[[np.ndarray, np.ndarray], float] = brier_score,
) -> float:
    """Return the temperature, in [0.1, 10], that makes a score smallest.

    Cross-entropy looks most at the surest answers, and leaves the others too sure:
    label smoothing has kept the surest from being as sure as they could.
    """

    def error(temperature: float) -> float:
        return score(temper(probabilities, temperature), labels)

    return float(minimize_scalar(error, bounds=(0.1, 10), method="bounded").x)


def calibrate(model: keras.Model, validation: Split) -> float:
    """Divide the last layer's weights by the temperature that fits images best.

    It is fitted on the mean of all views.

    Returns:
        The temperature.
    """
    probabilities = utils.predict_split(model, validation)
    temperature = fit_temperature(probabilities, validation.labels)
    layer = model.layers[-1]
    layer.set_weights([weights / temperature for weights in layer.get_weights()])
    return temperature


def plot_learning_curves(history: pd.DataFrame, watched: str) -> Figure:
    """Draw loss and accuracy of every epoch."""
    figure, axes = utils.make_figure(1, 2, figsize=(10, 4))
    for axis, metric in zip(axes, ("loss", "accuracy"), strict=True):
        sns.lineplot(history[metric], ax=axis, marker="o", label="train, augmented")
        sns.lineplot(history[f"val_{metric}"], ax=axis, marker="o", label=watched)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set(title="Loss", ylabel="cross-entropy, smoothed labels (nats)")
    axes[1].set(title="Accuracy", ylabel="images classified right")
    axes[1].yaxis.set_major_formatter(PercentFormatter(1))
    return figure


def plot_confusion_matrix(metrics: dict, class_names: Sequence[str]) -> Figure:
    """Draw which share of each true class got which answer, with counts."""
    counts = np.array(metrics["confusion_matrix"])
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    label = np.vectorize("{:.0%}\n{}".format)
    figure, axis = utils.make_figure(figsize=(7, 6))
    sns.heatmap(
        pd.DataFrame(shares, class_names, class_names),
        annot=label(shares, counts),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        cbar_kws={"label": "share of the true class", "format": PercentFormatter(1)},
        ax=axis,
    )
    accuracy = 100 * metrics["accuracy"]
    title = f"{metrics['images']} test images, accuracy {accuracy:.1f} %"
    axis.set(title=title, xlabel="predicted", ylabel="true")
    return figure


def plot_reliability(metrics: dict) -> Figure:
    """Draw how often answers are right against how sure they are, in 15 bins."""
    bins = pd.DataFrame(metrics["reliability"])
    shown = bins[bins.images > 0]
    figure, (axis, counts) = utils.make_figure(
        2, figsize=(6, 7), height_ratios=[3, 1], sharex=True
    )
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


def plot_class_distribution(splits: dict[str, Split]) -> Figure:
    """Draw the number of images of each class."""
    figure, axis = utils.make_figure(figsize=(8, 4))
    tables = {name: split.table for name, split in splits.items()}
    images = pd.concat(tables, names=["part"]).reset_index("part")
    sns.countplot(images, x="emotion", hue="part", ax=axis)
    for bars in axis.containers:
        axis.bar_label(bars, fontsize=8)
    axis.set(title="Images of each emotion", xlabel="", ylabel="images")
    sns.move_legend(axis, "upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def plot_example_images(train: Split, seed: int) -> Figure:
    """Draw up to eight training faces of each class, at random."""
    emotions, columns = train.table.emotion.cat.categories, 8
    size = columns + 1, len(emotions) + 0.5
    figure, axes = utils.make_figure(len(emotions), columns, figsize=size)
    figure.suptitle("Training images, before augmentation")
    random = np.random.default_rng(seed)
    for number, (row, emotion) in enumerate(zip(axes, emotions, strict=True)):
        rows = random.permutation(np.flatnonzero(train.labels == number))[:columns]
        row[0].set_ylabel(emotion, rotation=0, ha="right", va="center")
        for axis in row:
            axis.set(xticks=[], yticks=[], frame_on=False)
        for axis, face in zip(row, train.faces(rows), strict=False):
            axis.imshow(face, cmap="gray", vmin=0, vmax=1)
    return figure


@contextlib.contextmanager
def claiming(model_path: Path) -> Generator[None, None, None]:
    """Keep a model path, and what stands beside it, for this process alone.

    The lock ends with the block, or with the process, however that ends.

    Raises:
        UserError: if another process has it, or the place cannot be written to.
    """
    if model_path.is_dir():
        raise UserError(f"{model_path}: is a folder; name a file to write")
    folder, lock = model_path.parent, FileLock(model_path.with_suffix(".lock"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise UserError(f"{model_path}: another training is writing it") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot write there: {error.strerror}") from error
    try:
        check_space(model_path)
        yield
    finally:
        with contextlib.suppress(PermissionError):  # of Windows: release deletes it
            os.unlink(lock.lock_file)  # first: who waits for it then sees that it went
        lock.release()


def check_space(model_path: Path) -> None:
    """Make sure that a megabyte can be written under the longest name needed.

    Raises:
        UserError: if not.
    """
    probe = checkpoint_path(model_path).with_name(
        f".{model_path.stem}.checkpoint.new.npz"
    )
    try:
        probe.write_bytes(bytes(2**20))
    except OSError as error:
        raise UserError(f"{probe}: cannot write there: {error.strerror}") from error
    finally:
        probe.unlink(missing_ok=True)


def check_checkpoint(args: argparse.Namespace) -> None:
    """Make sure that an unfinished training is resumed or thrown away as was said.

    Raises:
        UserError: if one is there and neither was said, or none to resume.
    """
    checkpoint = checkpoint_path(args.model_path)
    if args.resume and not checkpoint.exists():
        raise UserError(f"{checkpoint}: no such file: no unfinished training to resume")
    if checkpoint.exists() and not (args.resume or args.restart):
        raise UserError(
            f"{checkpoint}: an unfinished training. "
            "Go on with it: --resume. Throw it away: --restart"
        )


def index_data(args: argparse.Namespace) -> tuple[dict[str, Split], str]:
    """Decode the images of the data folder, and print what there is.

    Returns:
        The splits: train, test (its table with a column in_train), perhaps validation;
        and the name of the one to watch.

    Raises:
        UserError: if the data do not serve.
    """
    splits, unreadable, others = {}, {}, set()
    for name in ("train", "test"):
        folder = args.data_dir / name
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder", hint=GET_DATA)
        # Beside the model: the system's own folder can be memory.
        scratch = args.model_path.parent
        splits[name], unreadable[name] = utils.index_folder(
            folder, args.classes, scratch
        )
        others.update(set(utils.list_folders(folder)) - set(args.classes))
    if others:
        names = printable(", ".join(sorted(others)))
        print(f"left out, not among the classes: {names}")
    train, test = splits["train"], splits["test"]
    test.table["in_train"] = test.table.digest.isin(train.table.digest)
    watched = "test"
    if args.validation_split:
        watched = "validation"
        splits["train"], splits[watched] = split_validation(
            train, args.validation_split
        )
    describe_data(splits, unreadable)
    return splits, watched


@utils.plain_text()
def write_results(
    model: keras.Model,
    history: pd.DataFrame,
    splits: dict[str, Split],
    watched: str,
    args: argparse.Namespace,
) -> tuple[dict, list[str]]:
    """Write the model file, measure it, and write figures and plots beside it.

    The model file takes its place last, so that a run that is stopped here can resume.
    The one that it replaces becomes <name>.previous.h5.

    Returns:
        What metrics.json holds: describe_run, the temperature, utils.evaluate. And the
        names of the files.
    """
    folder, attributes = args.model_path.parent, describe_run(args, splits)
    attributes["temperature"] = None
    if "validation" in splits:
        attributes["temperature"] = calibrate(model, splits["validation"])
    with utils.replacing(args.model_path) as new_model:
        utils.save_model(model, new_model, attributes)
        saved_model, _ = utils.load_model(new_model)
        metrics = utils.evaluate(saved_model, splits["test"])
        utils.write_attributes(new_model, metrics)
        with utils.replacing(folder / "history.csv") as file:
            history.to_csv(file)
        with utils.replacing(folder / "metrics.json") as file:
            file.write_text(json.dumps(attributes | metrics, indent=2) + "\n")
        confusion = plot_confusion_matrix(metrics["test"], args.classes)
        figures = {
            "learning_curves.png": plot_learning_curves(history, watched),
            "confusion_matrix.png": confusion,
            "reliability.png": plot_reliability(metrics["test"]),
            "class_distribution.png": plot_class_distribution(splits),
            "example_images.png": plot_example_images(splits["train"], args.seed),
        }
        for name, figure in figures.items():
            with utils.replacing(folder / name) as file:
                figure.savefig(file, dpi=120)
        # The same file is there if a kill came before the checkpoint was deleted.
        there = args.model_path.exists()
        if there and not filecmp.cmp(args.model_path, new_model, shallow=False):
            previous = args.model_path.with_suffix(".previous.h5")
            with utils.replacing(previous) as file:
                shutil.copyfile(args.model_path, file)
    names = [args.model_path.name, "history.csv", "metrics.json", *figures]
    return attributes | metrics, names


def run(args: argparse.Namespace) -> None:
    """Index, fit, evaluate, save, report.

    Raises:
        UserError: if the data do not serve, a file cannot be written, or an unfinished
            training is in the way.
    """
    begin, folder = time.monotonic(), args.model_path.parent
    if args.precision == "auto":
        args.precision = choose_precision()
    check_checkpoint(args)
    splits, watched = index_data(args)
    model, history = fit(splits["train"], splits[watched], args)
    try:
        metrics, names = write_results(model, history, splits, watched, args)
    except OSError as error:
        message = f"{folder}: cannot write there: {error}. Mend it, and --resume"
        raise UserError(message) from error
    utils.describe_metrics(metrics, args.classes)
    if temperature := metrics["temperature"]:
        print(f"Calibrated on the validation images: temperature {temperature:.2f}.")
    else:
        print("Not calibrated: that needs a --validation-split above 0.")
    print(f"\nDone in {(time.monotonic() - begin) / 60:.1f} minutes. Written:")
    print(*[f"  {printable(folder / name)}" for name in names], sep="\n")
    command = ["python", "predict.py", "--image", splits["test"].table.path[0]]
    if args.model_path != utils.MODEL_PATH:
        command += ["--model", str(args.model_path)]
    print(f"\nNow try: {printable(shlex.join(command))}")
    checkpoint_path(args.model_path).unlink()  # last: until here it can be resumed


def describe_stop(model_path: Path, argv: Sequence[str]) -> str:
    """Say what is kept of a training that was stopped, and how to go on."""
    checkpoint = checkpoint_path(model_path)
    try:
        about, _ = read_checkpoint(checkpoint)
    except UserError:
        return "stopped before an epoch was complete; nothing is kept"
    done, epochs = len(about["history"]), about["settings"]["epochs"]
    words = [word for word in argv if word not in ("--resume", "--restart")]
    command = shlex.join(["python", "train.py", *words, "--resume"])
    return (
        f"stopped; {done} of {epochs} epochs are kept in {checkpoint}. "
        f"Go on with: {command}"
    )


def terminate(number: int, frame: Any) -> None:
    """Let SIGTERM stop a training as Ctrl-C does."""
    raise KeyboardInterrupt(number)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an expected failure is one line and exit code 1."""
    warnings.filterwarnings("ignore", module="PIL")  # bad files are listed by name
    # File names may be any bytes, and logs are to show each epoch as it ends.
    utils.reconfigure(sys.stdout, errors="backslashreplace", line_buffering=True)
    args = parse_args(argv)
    try:
        with claiming(args.model_path):
            run(args)
    except UserError as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt as stop:
        words = sys.argv[1:] if argv is None else argv
        line = printable(describe_stop(args.model_path, words))
        print(f"train.py: {line}", file=sys.stderr)
        sys.exit(128 + (stop.args or (signal.SIGINT,))[0])


def leave(stop: SystemExit) -> None:
    """Exit at once: TensorFlow's threads can make Python's orderly exit abort.

    Raises:
        SystemExit: that same one in an interactive process, which is to go on.
    """
    if utils.is_interactive():
        raise stop
    if isinstance(stop.code, str):
        print(stop.code, file=sys.stderr)
    sys.stdout.flush()
    os._exit(1 if isinstance(stop.code, str) else stop.code or 0)


if __name__ == "__main__":
    if not utils.is_interactive():
        signal.signal(signal.SIGTERM, terminate)
    try:
        main()
    except SystemExit as stop:
        leave(stop)
