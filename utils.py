"""What train.py and predict.py share: pixels, the model file, predictions, figures.

If the two scripts disagreed about any of this, predictions would be silently wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import h5py
import numpy as np
import pillow_heif
from PIL import Image, ImageOps

if TYPE_CHECKING:  # slow imports are made where they are used
    import pandas as pd
    from matplotlib.figure import Figure

IMAGE_SIZE = 48  # pixels a side, FER2013's own size
RESCALE = 1 / 255  # 8-bit pixels to [0, 1]
SCALES = [1, 0.9, 1.2]  # of the views for test-time augmentation
MODEL_PATH = Path("models", "face_classification_model.h5")  # below ROOT
ROOT = Path(__file__).resolve().parent

WORKERS = max(2, min(8, os.cpu_count() or 2))  # threads that read images
LARGE_IMAGE = 2**24  # pixels of an image
MAX_FRAMES = 20  # of an animation, searched for one that shows something
MIN_SIDE = 12  # pixels a side of an image of a face, at least
Image.MAX_IMAGE_PIXELS = 250_000_000  # for phones' photos; Pillow's limit is 89 million
NEARLY_BLACK = 8  # of 255; an image with no brighter pixel shows nothing
BLANK = f"shows nothing: nearly black or of one gray or below {MIN_SIDE} pixels a side"
TOO_LARGE = "too large; 250 million pixels at most: scale it down"
CHUNK = 64  # files, or faces, that go through the network together
MARK = b"drawn by predict.py"  # in the EXIF data of what it draws
IGNORED = {"thumbs.db", "desktop.ini"}  # left in picture folders by Windows

pillow_heif.register_heif_opener()
# Not all formats of Pillow: for EPS, for example, it would start another program.
FORMATS = "AVIF BMP GIF HEIF JPEG JPEG2000 PNG PPM TIFF WEBP".split()

# What decoders raise for broken files.
DECODER_ERRORS = (
    *(OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError),
    *(SyntaxError, EOFError, MemoryError, AssertionError),
    *(struct.error, Image.DecompressionBombError),
)

# Settings of layers that only training needs: initializers, regularizers, ...
TRAINING_SETTINGS = re.compile(
    "name|trainable|momentum|renorm_momentum|seed|batch_input_shape"
    "|.*_(initializer|regularizer|constraint)"
)
FOREIGN_MODELS = {
    ".keras": "a model in Keras' newer format",
    ".onnx": "an ONNX graph",
    ".pt": "a PyTorch model",
    ".pth": "a PyTorch model",
    ".tflite": "a TensorFlow Lite model",
}
MAX_SIZE = 256  # pixels a side of a network's input
MAX_SETTING = 2**20  # largest number in the settings of a layer
MAX_VALUES = 2**20  # in the output of a layer for one face
MAX_BYTES = 2 * 10**8  # of a model file, and of its arrays together
MAX_LAYERS = 200
MAX_WEIGHTS = 16  # arrays of a layer
MAX_CHUNKS = 10_000  # of a chunked array
MAX_ATTRIBUTE = 2**20  # characters of an attribute


# --- Messages, paths, processes ---
def printable(text: object) -> str:
    """Escape characters that a terminal would not print, line ends among them."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text)
    )


class UserError(Exception):
    """An expected failure, in one line: what is wrong, where, and what to do.

    Every function that reads or writes files of the user may raise it. The message is
    made safe to print; the hint is printed as it is.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(printable(message) + hint)


class NotAnImageError(OSError):
    """A file that is not an image."""


class ArgumentParser(argparse.ArgumentParser):
    """An argument parser whose messages are safe to print."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        super().error(printable(message))


def of_project(path: Path) -> Path:
    """Return a path of the project from any current folder, as short as possible."""
    return path if Path.cwd() == ROOT else ROOT / path


def join_command(words: Sequence[str]) -> str:
    """Join a command's words, quoted for the shell of this system."""
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def is_interactive() -> bool:
    """Tell whether this is Python's shell, a notebook (with sys.ps1, too) or IDLE."""
    return hasattr(sys, "ps1") or bool(sys.flags.inspect) or "idlelib" in sys.modules


def reconfigure(stream: Any, **options: Any) -> None:
    """Reconfigure a text stream, if it can be: those of notebooks cannot."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(**options)


def import_openvino() -> Any:
    """Import OpenVINO without its model converters, whose import starts telemetry."""
    sys.modules.setdefault("openvino.tools", None)
    import openvino

    return openvino


def compile_network(model: Any) -> Any:
    """Compile an OpenVINO model in float32: other precisions would change answers."""
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return import_openvino().compile_model(model, "CPU", options)


def is_target(path: str | int, targets: Sequence[Path]) -> bool:
    """Tell whether a file, or an open one, is to be written, also through links."""
    return os.path.isfile(path) and any(
        os.path.isfile(target) and os.path.samefile(path, target) for target in targets
    )


def list_files(folder: Path) -> Iterator[str]:
    """Yield the path of every file below a folder, in a fixed order.

    Hidden files and folders, Thumbs.db and desktop.ini are ignored. Links to folders
    are followed. Names do not matter: the content decides what is an image.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    seen = set()  # links may lead to a folder twice, or back to their own
    for parent, subfolders, names in os.walk(folder, onerror=fail, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(names):
            if name[0] != "." and name.lower() not in IGNORED:
                yield os.path.join(parent, name)


# --- Pictures ---
# Files that are no readable image raise OSError.
def to_8_bits(image: Image.Image) -> Image.Image:
    """Convert an image of any Pillow mode to L (gray) or RGB, 8 bits a channel.

    Transparent pixels become white. Values of 16 bits, or of fewer that are stored in
    16, are scaled to 8. Floats and larger integers have no defined range: ValueError.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "F" or values.min() < 0 or values.max() > 65535:
            raise ValueError("its pixels have no defined range; convert it to 8 bits")
        # Values stored in 16 bits may have 8 or, from cameras and scanners, 12.
        white = next(top for top in (255, 4095, 65535) if values.max() <= top)
        values = np.where(values == image.info.get("transparency"), white, values)
        values = (values.astype(np.uint32) * 255 + white // 2) // white
        return Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image if image.mode == "L" else image.convert("RGB")


def decode(image: Image.Image) -> Image.Image:
    """Decode an open image file: the first frame that shows something, upright."""
    image.load()
    with contextlib.suppress(*DECODER_ERRORS):  # animations may begin blank
        while is_blank(image) and image.tell() < MAX_FRAMES:
            image.seek(image.tell() + 1)
            image.load()
    with contextlib.suppress(*DECODER_ERRORS):  # broken EXIF says nothing
        ImageOps.exif_transpose(image, in_place=True)
    return to_8_bits(image)


large_image_lock = threading.Lock()  # decoded one at a time, to save memory


def open_image(path: str | Path, reduce_to: int | None = None) -> Image.Image:
    """Decode an image file, upright as its EXIF orientation says.

    With reduce_to, a JPEG is decoded at half, a quarter or an eighth of its size as
    long as both sides keep reduce_to pixels: this is faster and needs less memory. The
    image, of mode L or RGB, has the factor of reduction as info["reduced"].
    """
    try:
        if not os.path.isfile(path):  # opening a pipe would wait for ever
            raise OSError("no such file" if not os.path.exists(path) else "not a file")
        if not os.path.getsize(path):
            raise OSError("empty file")
        with Image.open(path, formats=FORMATS) as image:
            pixels = image.width * image.height
            if pixels > Image.MAX_IMAGE_PIXELS:
                raise OSError(TOO_LARGE)
            if MARK in (image.info.get("exif") or b""):
                raise OSError(f"{MARK.decode()}; name the photo itself")
            width = image.width
            if reduce_to:
                image.draft(None, (reduce_to, reduce_to))
            reduced = width / image.width
            with large_image_lock if pixels > LARGE_IMAGE else contextlib.nullcontext():
                result = decode(image)
            result.info["reduced"] = reduced  # last, as other steps drop it
            return result
    except Image.UnidentifiedImageError as error:
        raise NotAnImageError(f"{path}: not an image") from error
    except DECODER_ERRORS as error:
        reason = getattr(error, "strerror", None) or str(error) or "unreadable"
        if isinstance(error, Image.DecompressionBombError):  # at twice the limit
            reason = TOO_LARGE
        line = str(reason).partition("\n")[0]
        raise OSError(f"{path}: {line}") from error


def to_pixels(image: Image.Image, size: int = IMAGE_SIZE) -> np.ndarray:
    """Scale an image of mode L or RGB to square grayscale, uint8 of (size, size).

    The centre square is used, so that a face keeps its proportions. A gray image that
    already has the right size stays as it is.
    """
    gray = image.convert("L")
    if gray.size != (size, size):
        # Lanczos removes details that are too fine for the new size.
        gray = ImageOps.fit(gray, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(gray)


def to_input(pixels: np.ndarray) -> np.ndarray:
    """Turn pixels, uint8 (..., n, n), into network input, float32 (..., n, n, 1)."""
    return pixels[..., np.newaxis] * np.float32(RESCALE)


def is_blank(image: Image.Image) -> bool:
    """Tell whether an image shows nothing: it is tiny, nearly black, or of one gray."""
    darkest, brightest = image.convert("L").getextrema()
    is_dark = brightest < NEARLY_BLACK
    return is_dark or darkest == brightest or min(image.size) < MIN_SIDE


def read_pixels(path: str | Path, size: int = IMAGE_SIZE) -> np.ndarray:
    """Read an image file that shows something as square grayscale, (size, size)."""
    image = open_image(path)
    if is_blank(image):
        raise OSError(f"{path}: {BLANK}")
    return to_pixels(image, size)


# --- Index ---
def list_folders(folder: Path) -> list[str]:
    """Return the names of a folder's own folders, sorted, without hidden ones."""
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    found = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in found if name[0] != ".")


class Split(NamedTuple):
    """The images of a split, decoded once: a table of them, and their pixels.

    The table has one row per image: path, emotion, and digest, a 64-bit hash of its
    pixels. Its row labels are positions in pixels, uint8 of shape (n, size, size), an
    array that is mapped from disk.
    """

    table: pd.DataFrame
    pixels: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """Class indices, of shape (n,)."""
        return self.table.emotion.cat.codes.to_numpy()

    def take(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return the pixels of rows of the table, uint8 (n, 48, 48)."""
        return self.pixels[self.table.index.to_numpy()[rows]]

    def faces(self, rows: slice | np.ndarray = slice(None)) -> np.ndarray:
        """Return rows of the table as network input, float32 (n, 48, 48, 1)."""
        return to_input(self.take(rows))

    def select(self, mask: pd.Series) -> Split:
        """Return the images for which a mask, one boolean per row, is true."""
        return Split(self.table[mask], self.pixels)


def match_folders(folder: Path, class_names: Sequence[str]) -> dict[str, Path]:
    """Find the folder of each class that has one, ignoring upper and lower case."""

    def fold(name: str) -> str:
        return unicodedata.normalize("NFC", name).casefold()  # macOS writes NFD

    folders, names = {}, list_folders(folder)
    for class_name in class_names:
        found = [name for name in names if fold(name) == fold(class_name)]
        if len(found) > 1:
            both = " and ".join(found)
            raise UserError(f"{folder}: {both} are one class; join them")
        if found:
            folders[class_name] = folder / found[0]
    return folders


def index_images(
    table: pd.DataFrame,
    items: Sequence[Any],
    read: Callable[[Any], np.ndarray],
    scratch: Path | None,
) -> tuple[Split, list[str]]:
    """Decode images into an array that is mapped from a temporary file.

    The file has no name, so that it is gone with the process, however that ends. It
    is in the folder scratch, or the system's for temporary files. The table has path
    and emotion of each image. Of each item, read returns uint8 (size, size), or raises
    OSError.

    Returns:
        The images, and a message for each that cannot be read.
    """
    from rich.progress import track

    digests, unreadable = np.zeros(len(items), np.uint64), {}
    chunks = range(0, len(items), 1000)  # a few at once, to save memory
    shown = {"transient": True, "disable": not sys.stdout.isatty()}
    try:
        with (
            tempfile.TemporaryFile(dir=scratch) as file,
            ThreadPoolExecutor(WORKERS) as pool,
            contextlib.ExitStack() as stack,
        ):
            # At Ctrl-C, files that are not yet read must not be waited for.
            stack.callback(pool.shutdown, wait=False, cancel_futures=True)
            for start in track(chunks, "Decoding", **shown):
                futures = [pool.submit(read, x) for x in items[start : start + 1000]]
                for row, future in enumerate(futures, start):
                    try:
                        pixels = future.result()
                    except OSError as error:
                        unreadable[row] = str(error)
                        continue
                    digest = hashlib.blake2b(pixels, digest_size=8).digest()
                    digests[row] = int.from_bytes(digest, "big")
                    file.write(pixels)
                    shape = pixels.shape
            file.flush()
            array = None
            if count := len(items) - len(unreadable):  # an empty map is an error
                # The map keeps the file when it is closed.
                array = np.memmap(file, np.uint8, "r", shape=(count, *shape))
    except OSError as error:
        place = scratch or tempfile.gettempdir()
        raise UserError(f"{place}: cannot write there: {error.strerror}") from error
    table = table.assign(digest=digests).drop(index=list(unreadable))
    return Split(table.reset_index(drop=True), array), list(unreadable.values())


def index_folder(
    folder: Path,
    class_names: Sequence[str],
    scratch: Path | None = None,
    partial: bool = False,
    size: int = IMAGE_SIZE,
) -> tuple[Split, list[str]]:
    """Decode every image below folder/<class name>/, as index_images does.

    With partial, classes may lack a folder.
    """
    import pandas as pd

    folders = match_folders(folder, class_names)
    missing = [name for name in class_names if name not in folders]
    if missing and not (partial and folders):
        found = list_folders(folder)
        message = f"{folder}: no folder {', '.join(missing)}; found instead: "
        message += ", ".join(found) or "nothing"
        if are_class_names(found) and not partial:
            message += f"; to train on these: --classes {join_command(found)}"
        raise UserError(message)
    rows = [(path, name) for name in folders for path in list_files(folders[name])]
    table = pd.DataFrame(rows, columns=["path", "emotion"])
    table["emotion"] = pd.Categorical(table.emotion, class_names)
    read = functools.partial(read_pixels, size=size)
    split, unreadable = index_images(table, list(table.path), read, scratch)
    for name, path in folders.items():
        is_needed = not partial or not len(split.table)
        if is_needed and name not in split.table.emotion.values:
            count = (table.emotion == name).sum()
            raise UserError(f"{path}: no image, {count} files of other kinds")
    return split, unreadable


# --- Model file ---
def check_heaps(content: bytes) -> None:
    """Refuse a file in which HDF5 1.14 would loop for ever, even after Ctrl-C.

    It loops at free space of size 0 in a heap, where the texts of attributes are.
    """
    steps = itertools.count()
    for heap in re.finditer(rb"GCOL\x01...(.{8})", content, re.DOTALL):
        place, end = heap.end(), heap.start() + int.from_bytes(heap[1], "little")
        while place + 16 <= min(end, len(content)):
            number, size = struct.unpack_from("<H6xQ", content, place)
            if (number == 0 and size < 16) or next(steps) > 10**6:
                raise ValueError("HDF5 would never finish reading it")
            place += size if number == 0 else 16 + (size + 7) // 8 * 8


def read_attribute(file: h5py.File, name: str) -> Any:
    """Read the JSON in a root attribute of a model file."""
    if name not in file.attrs:
        only = ", perhaps weights only" if name == "model_config" else ""
        raise ValueError(f"it holds no {name}{only}")
    # An array of texts could hold one long text a million times.
    text = file.attrs[name] if file.attrs.get_id(name).shape == () else None
    if not isinstance(text, str | bytes) or len(text) > MAX_ATTRIBUTE:
        raise ValueError(f"its {name} is no text, or too long")
    return json.loads(text)


def find(file: h5py.File, path: str) -> Any:
    """Return the group or array at a path without links: they may leave the file."""
    item = file
    for name in path.split("/"):
        is_group = isinstance(item, h5py.Group)
        if not is_group or type(item.get(name, getlink=True)) is not h5py.HardLink:
            raise ValueError(f"its {path} is missing, or a link")
        item = item[name]
    return item


def is_stored_whole(array: h5py.Dataset) -> bool:
    """Tell whether the file itself holds all of an array, plain or compressed."""
    if array.external or array.is_virtual:
        return False
    if array.chunks is None:
        return array.id.get_storage_size() == array.nbytes
    properties, deflate = array.id.get_create_plist(), h5py.h5z.FILTER_DEFLATE
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    size = math.prod(array.chunks) * array.dtype.itemsize
    places = [range(0, *pair) for pair in zip(array.shape, array.chunks, strict=True)]
    count = math.prod(map(len, places))
    is_large = count * size > 2 * array.nbytes + MAX_ATTRIBUTE or count > MAX_CHUNKS
    if is_large or filters not in ([], [deflate], [h5py.h5z.FILTER_SHUFFLE, deflate]):
        return False
    for place in itertools.product(*places):  # HDF5 would unpack a bomb without limit
        skipped, chunk = array.id.read_direct_chunk(place)
        if filters:
            chunk = zlib.decompressobj().decompress(chunk, size + 1)
        if skipped or len(chunk) != size:
            return False
    return True


def is_plain(value: Any) -> bool:
    """Tell whether a setting is text, a number of usual size, or a short list."""
    if isinstance(value, list):
        return len(value) <= 4 and all(map(is_plain, value))
    is_number = isinstance(value, bool | int | float) and abs(value) <= MAX_SETTING
    return is_number or isinstance(value, str | None)


class Settings:
    """The settings of a layer. Each that is not read must have Keras' default."""

    def __init__(self, layer: dict[str, Any]) -> None:
        self.kind, self.all = layer["class_name"], layer["config"]
        self.unread = dict(self.all)

    def __getattr__(self, name: str) -> Any:
        """Read a setting; UNSET has it if the layer has none."""
        self.unread.pop(name, None)
        value = self.all.get(name, UNSET.get(name))
        if not is_plain(value) or (name == "activation" and value not in ACTIVATIONS):
            raise ValueError(f"{name} of its layer {self.kind} is {value}")
        return value

    def check_unread(self) -> None:
        """Refuse settings that are not None, False, in ALLOWED, or for training."""
        for name, value in self.unread.items():
            if name == "dtype" and isinstance(value, dict):
                value = value["config"]["name"]
            is_default = value in ALLOWED.get(name, (None, False))
            if not is_default and not TRAINING_SETTINGS.fullmatch(name):
                known = "which predictions do not know"
                raise ValueError(f"{name} of its layer {self.kind} is {value}, {known}")


def name_inputs(layer: dict[str, Any], before: str) -> list[str]:
    """Return the names of a layer's input layers; by default the one before it."""
    if "inbound_nodes" not in layer:
        return [before]
    [node] = layer["inbound_nodes"]  # each layer is used once
    if isinstance(node, list):  # Keras 2
        return [tensor[0] for tensor in node]
    [tensors] = node["args"]
    tensors = tensors if isinstance(tensors, list) else [tensors]
    return [tensor["config"]["keras_history"][0] for tensor in tensors]


def read_layers(file: h5py.File) -> list[dict[str, Any]]:
    """Read the layers of a network, Keras 2's in the form of Keras 3."""
    network = read_attribute(file, "model_config")
    kind, config = network["class_name"], network["config"]
    if kind not in ("Sequential", "Functional", "Model"):
        raise ValueError(f"its network is of kind {kind}")
    layers = config if isinstance(config, list) else config["layers"]
    if len(layers) > MAX_LAYERS:
        raise ValueError("its network is too deep")
    first = layers[0]["config"]
    shape = first.get("batch_input_shape")
    if layers[0]["class_name"] == "InputLayer":
        first.setdefault("batch_shape", shape)
    elif shape:
        begin = {"name": "input", "batch_shape": shape}
        layers = [{"class_name": "InputLayer", "config": begin}, *layers]
    return layers


def are_class_names(names: Any) -> bool:
    """Tell whether these are two or more different names that are safe to print."""
    return (
        isinstance(names, list)
        and all(isinstance(name, str) and name.isprintable() for name in names)
        and not any(name[:1] in "=+-@" for name in names)  # formulas in a CSV, or empty
        and len(set(names)) == len(names) > 1
    )


def describe_network(
    file: h5py.File, layers: list[dict[str, Any]], class_names: list[str] | None
) -> tuple[list[str], bool, str]:
    """Read class names, whether pixels are 0 to 255, and what had to be assumed."""
    if "class_names" in file.attrs:
        own = read_attribute(file, "class_names")
        rescale = read_attribute(file, "rescale")
        if class_names:
            raise UserError(f"{file.filename}: names its classes; omit --classes")
        if rescale != RESCALE:
            raise ValueError(f"its rescale is {rescale}, not 1 / 255")
        if not are_class_names(own):
            raise ValueError(f"its class names are {own}")
        return own, False, ""
    if not class_names:
        names = "give predict.py --classes, in the order of its outputs"
        raise UserError(f"{file.filename}: holds no class names; {names}")
    scales = [x["config"]["scale"] for x in layers if x["class_name"] == "Rescaling"]
    raw = any(isinstance(scale, float) and scale <= 0.1 for scale in scales)
    pixels = "0 to 255, which it scales itself" if raw else "0 to 1"
    return class_names, raw, f"taken for a network of gray pixels of {pixels}"


# --- Layers ---
# What each activation function computes, by its name in Keras.
ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "linear": lambda op, x: x,
    "relu": lambda op, x: op.relu(x),
    "relu6": lambda op, x: op.clamp(x, 0, 6),
    "leaky_relu": lambda op, x: op.prelu(x, np.float32([0.2])),
    "elu": lambda op, x: op.elu(x, 1),
    "selu": lambda op, x: op.selu(x, np.float32(1.67326324), np.float32(1.05070099)),
    "gelu": lambda op, x: op.gelu(x, "ERF"),
    "silu": lambda op, x: op.swish(x),
    "swish": lambda op, x: op.swish(x),
    "sigmoid": lambda op, x: op.sigmoid(x),
    "hard_sigmoid": lambda op, x: op.hsigmoid(x),
    "tanh": lambda op, x: op.tanh(x),
    "softplus": lambda op, x: op.softplus(x),
    "softsign": lambda op, x: op.softsign(x),
    "exponential": lambda op, x: op.exp(x),
    "softmax": lambda op, x: op.softmax(x, channel_axis(x)),
}
PADDINGS = {"same": "same_upper", "valid": "valid"}
# The kinds of layers in a network. The function compute says what each does.
LAYERS = (
    "Conv2D DepthwiseConv2D SeparableConv2D Dense MaxPooling2D AveragePooling2D "
    "GlobalMaxPooling2D GlobalAveragePooling2D BatchNormalization LayerNormalization "
    "GroupNormalization Activation ReLU LeakyReLU PReLU ELU Softmax Flatten Reshape "
    "ZeroPadding2D Rescaling Add Multiply Concatenate"
).split()
# Values that settings which compute does not read may have besides None and False.
# Keras 2 gives depthwise convolutions groups.
ALLOWED = {
    "dtype": ["float32"],
    "data_format": [None, "channels_last"],
    "groups": [1],
}
# The values of these settings in layers that have none.
UNSET = {"axis": -1, "use_bias": False, "activation": "linear"}
TRAINING_ONLY = re.compile(
    r"\w*Dropout(2D)?|GaussianNoise|ActivityRegularization|Random(?!Crop)\w+"
)


def shape_of(x: Any) -> list[int]:
    """Return the shape of a node without its batch axis."""
    return [size.get_length() for size in list(x.get_output_partial_shape(0))[1:]]


def is_image(x: Any) -> bool:
    """Tell whether a node holds images, of shape (channels, height, width)."""
    return len(shape_of(x)) == 3


def channel_axis(x: Any) -> int:
    """Return the axis of a node's channels."""
    return 1 if is_image(x) else len(shape_of(x))


def pair(value: Any) -> list[int]:
    """Return a setting of one or two whole numbers as two."""
    values = value if isinstance(value, list) else [value, value]
    if [type(number) for number in values] != [int, int] or min(values) < 0:
        raise ValueError(f"{value} is not one or two whole numbers")
    return values


class Graph:
    """An OpenVINO graph that grows layer by layer, with the weights of a model file.

    Images are NCHW, which is faster than Keras' NHWC.
    """

    def __init__(self, file: h5py.File) -> None:
        self.op = import_openvino().opset13
        self.file = file
        self.layer = ""  # name of the current layer
        self.faces = self.output = None  # first and last node
        self.weights: list[np.ndarray] = []  # in the order of reading, which is Keras'
        self.space = MAX_BYTES  # bytes left for the arrays

    def read(self, name: str, *shape: int) -> np.ndarray:
        """Read an array of the current layer, which must have this shape, as float32.

        Keras lists the paths of a layer's arrays; Keras 2 ends them in ":0". A kernel
        may be called depthwise_kernel.
        """
        place = f"model_weights/{self.layer}"
        attributes = find(self.file, place).attrs
        if math.prod(attributes.get_id("weight_names").shape or ()) > MAX_WEIGHTS:
            raise ValueError(f"its {place} lists too many weights")
        listed = map(os.fsdecode, attributes["weight_names"])
        paths = {p.rpartition("/")[2].removesuffix(":0"): p for p in listed}
        path = f"{place}/{paths.get(name, paths.get(f'depthwise_{name}', name))}"
        array = find(self.file, path)
        is_array = isinstance(array, h5py.Dataset)
        if not is_array or array.dtype not in (np.float16, np.float32):
            raise ValueError(f"its {path} is no array of float32 or float16")
        if array.shape != shape:
            raise ValueError(f"its {path} has shape {array.shape}, not {shape}")
        self.space -= array.nbytes
        if self.space < 0:
            raise ValueError("its network has more weights than a file may hold")
        if not is_stored_whole(array):
            raise ValueError(f"its {path} is not stored whole, plain or by deflate")
        values = array[...].astype(np.float32)
        if not np.isfinite(values).all():
            raise ValueError("some of its weights are NaN or infinite")
        self.weights.append(values)
        return values

    def read_channels(self, name: str, x: Any) -> np.ndarray:
        """Read an array with one number per channel of a node."""
        values = self.read(name, shape_of(x)[channel_axis(x) - 1])
        return values.reshape(-1, 1, 1) if is_image(x) else values

    def channels_last(self, x: Any) -> Any:
        """Return images as NHWC, and other nodes as they are."""
        return self.op.transpose(x, [0, 2, 3, 1]) if is_image(x) else x

    def channels_first(self, x: Any) -> Any:
        """Return images as NCHW, and other nodes as they are."""
        return self.op.transpose(x, [0, 3, 1, 2]) if is_image(x) else x

    def convolve(self, x: Any, c: Settings, kernel: np.ndarray, groups: int = 1) -> Any:
        """Convolve with a kernel (height, width, channels / groups, filters)."""
        weights = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1))
        strides, dilations = pair(c.strides), pair(c.dilation_rate)
        options = strides, [0, 0], [0, 0], dilations, PADDINGS[c.padding]
        if groups == 1:
            return self.op.convolution(x, weights, *options)
        weights = weights.reshape(groups, -1, *weights.shape[1:])
        return self.op.group_convolution(x, weights, *options)

    def check_size(self, x: Any) -> None:
        """Refuse the output of the current layer if it is empty or too large."""
        sizes = shape_of(x)
        if min(sizes) < 1 or math.prod(sizes) > MAX_VALUES:
            limit = f"1 to {MAX_VALUES} values are allowed"
            raise ValueError(f"its layer {self.layer} has the output {sizes}; {limit}")


def compute(g: Graph, kind: str, inputs: list, c: Settings) -> Any:
    """Apply a layer with the settings c, but not its bias and activation, to nodes."""
    op, x = g.op, inputs[0]
    match kind:
        case "Conv2D":
            groups = c.groups or 1  # missing in early versions of Keras
            channels = shape_of(x)[0] // groups
            kernel = g.read("kernel", *pair(c.kernel_size), channels, c.filters)
            return g.convolve(x, c, kernel, groups)
        case "DepthwiseConv2D" | "SeparableConv2D":  # each channel has own kernels
            n = shape_of(x)[0]
            kernel = g.read("kernel", *pair(c.kernel_size), n, c.depth_multiplier)
            kernel = kernel.reshape(*kernel.shape[:2], 1, -1)
            x = g.convolve(x, c, kernel, groups=n)
            if kind == "DepthwiseConv2D":
                return x
            g.check_size(x)
            kernel = g.read("pointwise_kernel", 1, 1, shape_of(x)[0], c.filters)
            c.strides = c.dilation_rate = 1
            return g.convolve(x, c, kernel)
        case "Dense":
            x = g.channels_last(x)
            kernel = g.read("kernel", shape_of(x)[-1], c.units)
            return g.channels_first(op.matmul(x, kernel, False, False))
        case "MaxPooling2D" | "AveragePooling2D":
            sizes = pair(c.strides), [0, 0], [0, 0], pair(c.pool_size)
            padding = {"auto_pad": PADDINGS[c.padding]}
            if kind == "AveragePooling2D":
                return op.avg_pool(x, *sizes, exclude_pad=True, **padding)
            op = import_openvino().opset1  # later versions of max_pool have two outputs
            return op.max_pool(x, *sizes, **padding)
        case "GlobalMaxPooling2D":
            return op.reduce_max(x, [2, 3], c.keepdims is True)
        case "GlobalAveragePooling2D":
            return op.reduce_mean(x, [2, 3], c.keepdims is True)
        case "BatchNormalization":
            gamma = g.read_channels("gamma", x) if c.scale else np.float32(1)
            beta = g.read_channels("beta", x) if c.center else np.float32(0)
            mean = g.read_channels("moving_mean", x)
            variance = g.read_channels("moving_variance", x)
            gamma = gamma / np.sqrt(np.maximum(variance, 0) + np.float32(c.epsilon))
            return op.add(op.multiply(x, gamma), beta - gamma * mean)
        case "LayerNormalization":
            x = op.mvn(x, [channel_axis(x)], True, float(c.epsilon), "INSIDE_SQRT")
            x = op.multiply(x, g.read_channels("gamma", x)) if c.scale else x
            return op.add(x, g.read_channels("beta", x)) if c.center else x
        case "GroupNormalization":
            if not is_image(x):
                raise ValueError(f"its layer {g.layer} does not normalize images")
            n = shape_of(x)[0]
            gamma = g.read("gamma", n) if c.scale else np.ones(n, np.float32)
            beta = g.read("beta", n) if c.center else np.zeros(n, np.float32)
            return op.group_normalization(x, gamma, beta, c.groups, float(c.epsilon))
        case "ReLU" | "LeakyReLU":  # alpha is the slope in Keras 2
            slope, alpha, limit = c.negative_slope, c.alpha, c.max_value
            x = op.prelu(x, np.float32([slope or alpha or 0]))
            return x if limit is None else op.minimum(x, np.float32(limit))
        case "PReLU":
            sizes, shared = shape_of(g.channels_last(x)), c.shared_axes or []
            shape = [1 if i in shared else size for i, size in enumerate(sizes, 1)]
            alpha, zero = g.read("alpha", *shape), np.float32(0)
            alpha = alpha.transpose(2, 0, 1) if is_image(x) else alpha
            below = op.multiply(op.minimum(x, zero), alpha)
            return op.add(op.maximum(x, zero), below)
        case "ELU":
            return op.elu(x, c.alpha)
        case "Softmax":
            return op.softmax(x, channel_axis(x))
        case "Flatten" | "Reshape":
            x, shape = g.channels_last(x), [-1]
            size = math.prod(shape_of(x))
            if kind == "Reshape":
                shape = list(c.target_shape)
            if -1 in shape:
                shape[shape.index(-1)] = size // -math.prod(shape)
            if math.prod(shape) != size:
                raise ValueError(f"target_shape of {g.layer} is {shape}")
            return g.channels_first(op.reshape(x, [-1, *shape], False))
        case "ZeroPadding2D":
            (top, bottom), (left, right) = map(pair, c.padding)
            begin, end = [0, 0, top, left], [0, 0, bottom, right]
            return op.pad(x, begin, end, "constant", np.float32(0))
        case "Rescaling":
            scale, offset = np.float32([float(c.scale), float(c.offset)])
            return op.add(op.multiply(x, scale), offset)
        case "Add" | "Multiply":
            if len({len(shape_of(node)) for node in inputs}) > 1:
                raise ValueError(f"its layer {g.layer} joins arrays of different ranks")
            return functools.reduce(op.add if kind == "Add" else op.multiply, inputs)
        case "Concatenate":
            return op.concat(inputs, channel_axis(x))
    return x  # of Activation


def add_layer(g: Graph, layer: dict[str, Any], inputs: list) -> Any:
    """Apply a layer to its inputs, with bias and activation if it has them."""
    kind, x = layer["class_name"], inputs[0]
    g.layer = layer["config"]["name"]
    if kind in LAYERS:
        c, rank = Settings(layer), len(shape_of(x)) + 1
        if c.axis not in (-1, rank - 1, [-1], [rank - 1]):
            raise ValueError(f"axis of its layer {g.layer} is {c.axis}, not the last")
        x = compute(g, kind, inputs, c)
        if kind.endswith(("Conv2D", "Dense", "Activation")):
            x = g.op.add(x, g.read_channels("bias", x)) if c.use_bias else x
            x = ACTIVATIONS[c.activation](g.op, x)
        c.check_unread()
    elif not TRAINING_ONLY.fullmatch(kind):
        known = ", ".join(LAYERS)
        raise ValueError(f"it holds a layer {kind}, not one of utils.LAYERS: {known}")
    g.check_size(x)
    return x


def build_graph(file: h5py.File, layers: list[dict[str, Any]], raw: bool) -> Graph:
    """Build a network with input in [0, 1], also if it takes raw pixels of 0 to 255."""
    first, *layers = layers
    _, size, *_ = shape = first["config"]["batch_shape"]
    if shape != [None, size, size, 1] or not MIN_SIDE <= size <= MAX_SIZE:
        n = f"n of {MIN_SIDE} to {MAX_SIZE}"
        raise ValueError(f"its input is {tuple(shape)}, not (None, n, n, 1), {n}")
    g = Graph(file)
    g.faces = g.op.parameter([-1, *shape[1:]], np.float32)
    pixels = g.op.multiply(g.faces, np.float32(1 / RESCALE)) if raw else g.faces
    g.layer = first["config"]["name"]
    nodes, used = {g.layer: g.channels_first(pixels)}, set()
    for layer in layers:
        names = name_inputs(layer, before=g.layer)
        used.update(names)
        nodes[layer["config"]["name"]] = add_layer(g, layer, [nodes[n] for n in names])
    [end] = nodes.keys() - used
    g.output = nodes[end]
    return g


# --- Predictions ---
def make_views(faces: np.ndarray) -> list[np.ndarray]:
    """Return views of faces (n, size, size, 1): scaled by each of SCALES, and mirrored.

    Pixels are interpolated linearly, and the edge is repeated. The first view is the
    faces as they are.
    """
    pixels, views = np.arange(faces.shape[1]), []
    middle = pixels.mean()
    for scale in SCALES:
        places = np.clip(middle + (pixels - middle) / scale, 0, pixels[-1])
        weights = np.maximum(0, 1 - np.abs(places[:, np.newaxis] - pixels))
        weights = weights.astype(faces.dtype)
        view = (weights @ faces[..., 0] @ weights.T)[..., np.newaxis]
        views += [view, view[:, :, ::-1]]
    return views


class Network:
    """A trained network: class names, weights, and predictions."""

    def __init__(self, graph: Graph, class_names: list[str], assumed: str) -> None:
        self.class_names, self.weights = class_names, graph.weights
        self.size = shape_of(graph.faces)[0]  # pixels a side of a face
        self.assumed = assumed  # what the file does not say
        model = import_openvino().Model([graph.output], [graph.faces])
        self.compiled = compile_network(model)
        self.lock = threading.Lock()  # a compiled model answers one thread at a time

    def predict(self, faces: np.ndarray, tta: bool = True) -> np.ndarray:
        """Predict faces of shape (n, size, size, 1), values in [0, 1].

        Returns:
            Class probabilities, float32 of shape (n, num_classes); with test-time
            augmentation (tta), the geometric mean of all views' (the mean of their
            log-probabilities).
        """
        means = np.empty((len(faces), len(self.class_names)), np.float32)
        for start in range(0, len(faces), CHUNK):
            chunk = faces[start : start + CHUNK]
            views = make_views(chunk) if tta else [chunk]
            with self.lock:
                probabilities = self.compiled(np.concatenate(views))[0]
            logs = np.log(np.maximum(probabilities, np.finfo(np.float32).tiny))
            mean = np.exp(np.mean(np.split(logs, len(views)), axis=0))
            means[start : start + CHUNK] = mean / mean.sum(axis=1, keepdims=True)
        return means


def gives_probabilities(node: Any) -> bool:
    """Tell whether the last operation that changes values gives probabilities."""
    while node.get_type_name() in ("Reshape", "Transpose", "ReduceMean"):
        node = node.input_value(0).get_node()
    return node.get_type_name() in ("Softmax", "Sigmoid", "HSigmoid")


def load_model(path: str | Path, class_names: list[str] | None = None) -> Network:
    """Load a model file that train.py wrote or, given class names, one of Keras.

    The network is built from the plain settings and arrays in the file. Nothing in the
    file is executed, and nothing outside it is read, whoever made it.
    """
    path, make = Path(path), "make one with: python train.py"
    if not os.path.isfile(path):
        raise UserError(f"{path}: no model file there; {make}")
    try:
        if os.path.getsize(path) > MAX_BYTES:
            raise ValueError(f"it is larger than {MAX_BYTES // 10**6} MB")
        content = path.read_bytes()
        if not h5py.is_hdf5(path):
            kind = FOREIGN_MODELS.get(path.suffix.lower(), "no HDF5 file")
            raise ValueError(f"it is {kind}")
        check_heaps(content)
        with h5py.File(path) as file:
            layers = read_layers(file)
            names, raw, assumed = describe_network(file, layers, class_names)
            graph = build_graph(file, layers, raw)
        shape = shape_of(graph.output)
        if shape != [len(names)]:
            count = "x".join(map(str, shape))
            raise ValueError(f"it has {count} outputs for {len(names)} classes")
        if assumed and not gives_probabilities(graph.output):
            graph.output = graph.op.softmax(graph.output, -1)
            assumed += ", and of logits"
        return Network(graph, names, assumed)
    except (*DECODER_ERRORS, AttributeError, zlib.error) as error:
        reason = str(error).partition("\n")[0][:600]
        if not class_names:
            reason = f"not a model file that train.py wrote: {reason}; {make}"
        raise UserError(f"{path}: {reason}") from error


def predict_split(network: Network, split: Split) -> np.ndarray:
    """Return the class probabilities of a split's images, (n, num_classes)."""
    chunks = range(0, len(split.table), CHUNK)
    parts = [network.predict(split.faces(slice(i, i + CHUNK))) for i in chunks]
    return np.concatenate(parts)


# --- Figures and plots ---
def evaluate(network: Network, split: Split) -> dict[str, Any]:
    """Measure a network on the images of a split, and on those not also in train."""
    probabilities, labels = predict_split(network, split), split.labels
    parts = {"test": np.ones(len(labels), bool)}
    if "in_train" in split.table:
        parts["not_in_train"] = ~split.table.in_train.to_numpy()
    return {
        name: classification_metrics(labels[rows], probabilities[rows])
        for name, rows in parts.items()
    }


def classification_metrics(
    labels: np.ndarray, probabilities: np.ndarray
) -> dict[str, Any]:
    """Compare probabilities, shape (n, num_classes), with true class indices, (n,).

    Returns:
        images, their number; accuracy and balanced_accuracy, in [0, 1];
        precision, recall and f1 per class, in [0, 1], 0 where undefined;
        confusion_matrix, counts, one row per true class; and calibration_metrics.
    """
    from sklearn import metrics

    if not len(labels):
        return {"images": 0}
    classes, predictions = range(probabilities.shape[1]), probabilities.argmax(axis=1)
    confusion = metrics.confusion_matrix(labels, predictions, labels=classes)
    precision, recall, f1, counts = metrics.precision_recall_fscore_support(
        labels, predictions, labels=classes, zero_division=0
    )
    right = predictions == labels
    return {
        "images": len(labels),
        "accuracy": right.mean(),
        "balanced_accuracy": recall[counts > 0].mean(),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
        "f1": f1.tolist(),
        "confusion_matrix": confusion.tolist(),
    } | calibration_metrics(probabilities.max(axis=1), right)


def calibration_metrics(confidences: np.ndarray, right: np.ndarray) -> dict[str, Any]:
    """Compare confidences with whether answers were right, both of shape (n,).

    Returns:
        ece, the expected calibration error in 15 bins of equal width (Guo et al.
        2017), in [0, 1]; reliability, the number of images, mean confidence and
        accuracy of each bin, 0 if empty; and coverage, rows of a confidence, the share
        of images that reach it, and their accuracy.
    """
    edges = np.linspace(0, 1, 16)
    which = np.digitize(confidences, edges[1:-1])
    images = np.bincount(which, minlength=15)
    sums = [np.bincount(which, values, 15) for values in (confidences, right)]
    confidence, accuracy = sums / np.maximum(images, 1)
    sure = {limit: right[confidences >= limit] for limit in (0.5, 0.6, 0.7, 0.8)}
    bins = {"images": images, "confidence": confidence, "accuracy": accuracy}
    return {
        "ece": np.abs(accuracy - confidence) @ images / len(right),
        "reliability": {name: values.tolist() for name, values in bins.items()},
        "coverage": [
            [limit, len(part) / len(right), part.sum() / max(len(part), 1)]
            for limit, part in sure.items()
        ],
    }


def percent(fraction: float) -> str:
    """Format a fraction like 93.1 %."""
    return f"{100 * fraction:.1f} %"


def describe_metrics(metrics: dict[str, Any], class_names: Sequence[str]) -> str:
    """Format what evaluate returned, and the accuracy of always the same answer."""
    import pandas as pd
    from sklearn.metrics import classification_report

    test = metrics["test"]
    confusion, names = np.array(test["confusion_matrix"]), list(class_names)
    # Two rows again, true and predicted, with one column per image.
    each = np.repeat(np.indices(confusion.shape).reshape(2, -1), confusion.ravel(), 1)
    options = {"labels": range(len(names)), "target_names": names, "zero_division": 0}
    lines = [
        "",
        classification_report(*each, digits=3, **options),
        "All test images, rows true, columns predicted:",
        pd.DataFrame(confusion, names, names).to_string(),
        "",
        "confidence at least  images  accuracy",
    ]
    for limit, share, accuracy in test["coverage"]:
        lines.append(f"{limit:19} {percent(share):>7} {percent(accuracy):>9}")
    most = int(confusion.sum(axis=1).argmax())
    for name, place in {"test": "all", "not_in_train": "not also in train"}.items():
        part = metrics.get(name, {"images": 0})
        count = part["images"]
        if not count or (name != "test" and count == test["images"]):
            continue
        spread = 1.96 * (part["accuracy"] * (1 - part["accuracy"]) / count) ** 0.5
        guess = sum(part["confusion_matrix"][most]) / count
        lines += [
            "",
            f"Test accuracy {percent(part['accuracy'])} ± {percent(spread)} "
            f"({count} images, {place}; 95 % interval)",
            f"  balanced accuracy {percent(part['balanced_accuracy'])}, "
            f"always {names[most]} {percent(guess)}, "
            f"calibration error (ECE) {part['ece']:.3f}",
        ]
    return "\n".join(lines) + "\n"


@functools.cache
def find_fonts(text: str) -> list[str] | None:
    """Return installed fonts that together have every letter of a text, or None."""
    from matplotlib import font_manager

    def letters(path: str) -> set[int]:
        with contextlib.suppress(OSError, RuntimeError):  # a bitmap font, for example
            return set(font_manager.get_font(path).get_charmap())
        return set()

    found = ["DejaVu Sans"]  # part of Matplotlib
    missing = set(map(ord, text)) - letters(font_manager.findfont(found[0]))
    for font in font_manager.fontManager.ttflist:
        if missing and not font.name.startswith("Last Resort"):  # which has only boxes
            new = missing & letters(font.fname)
            if new:
                found.append(font.name)
            missing -= new
    if not missing:
        return found
    line = printable(f"no installed font has {''.join(map(chr, sorted(missing)))}")
    print(f"{line}; in figures the classes have numbers", file=sys.stderr)
    return None


@contextlib.contextmanager
def naming_classes(class_names: Sequence[str]) -> Iterator[list[str]]:
    """Yield class names to show in figures: numbers, if no font has their letters."""
    import matplotlib

    names, fonts = list(class_names), find_fonts("".join(class_names))
    # A $ in a name stays a $, and does not begin a formula.
    options = {"text.parse_math": False, "font.family": fonts or ["DejaVu Sans"]}
    options |= {"savefig.dpi": "figure", "savefig.bbox": None}  # pixel by pixel
    with matplotlib.rc_context(options):
        yield names if fonts else [str(i) for i in range(1, len(names) + 1)]


def plot_confusion_matrix(metrics: dict, class_names: Sequence[str]) -> Figure:
    """Plot the fraction of each true class that was predicted as each class."""
    import pandas as pd
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    counts = np.array(metrics["confusion_matrix"])
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(7, 6), layout="constrained")
    axis = figure.subplots()
    sns.heatmap(
        pd.DataFrame(fractions, class_names, class_names),
        annot=np.vectorize("{:.0%}\n{}".format)(fractions, counts),
        fmt="",
        cmap="Blues",
        vmin=0,
        vmax=1,
        cbar_kws={"label": "fraction of the true class", "format": PercentFormatter(1)},
        ax=axis,
    )
    accuracy = percent(metrics["accuracy"])
    title = f"{metrics['images']} test images, accuracy {accuracy}"
    axis.set(title=title, xlabel="predicted", ylabel="true")
    return figure


# --- Writing files ---
@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a hidden path, whose file replaces path if the block ends well."""
    temporary = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # a power cut must not leave an empty file
        for wait in (0.1, 0.3, 1, None):
            try:
                os.replace(temporary, path)
                break
            except PermissionError:  # on Windows, while a virus scanner reads it
                if wait is None:
                    raise
                time.sleep(wait)
    finally:
        with contextlib.suppress(OSError):  # it would hide the first error
            temporary.unlink()
