"""Feed mutated image and model files to the readers, and look at what they answer.

    python tests/fuzz.py

Each mutant is read or refused with the documented error, within two seconds and a
gigabyte of memory, in a process that survives it; the script ends with 1 otherwise.
"""

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

SECONDS, KILOBYTES = 2, 2**20
SEEDS = 2000  # for a process; it keeps what it read, as predict.py does
MODES = "1", "L", "P", "I;16", "RGB", "RGBA", "CMYK"
STRANGE = [None, True, -1, 0, 10**9, 10**30, 0.5, "x", "", [], [0, 0], {}, [None]]
SPAWN = multiprocessing.get_context("spawn")


def make_images(path: Path) -> list[bytes]:
    """Return image files of all formats and modes, with EXIF data and a profile."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)
    noise = Image.fromarray(noise).resize((112, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif, "icc_profile": bytes(200), "progressive": True}
    images = []
    for kind in utils.FORMATS:
        for mode in MODES:
            image = noise.convert("L" if mode == "I;16" else mode).convert(mode)
            options["compression"] = "tiff_lzw" if mode == "RGB" else None
            options["save_all"] = kind == "WEBP"
            options["append_images"] = [image.rotate(90)]
            with contextlib.suppress(OSError, ValueError):  # a mode it does not have
                image.save(path, kind, **options)
                images.append(path.read_bytes())
    return images


def make_models(path: Path) -> list[bytes]:
    """Return a small model file, plain and compressed."""
    import train

    model = train.build_model((48, 48, 1), 2, [2, 3], 2)
    attributes = {"class_names": ["happy", "sad"], "rescale": utils.RESCALE}
    train.save_model(model, path, attributes)
    models, names = [path.read_bytes()], []
    options = {"compression": "gzip", "shuffle": True}
    with h5py.File(path, "r+") as file:
        file.visit(names.append)
        for name in names:
            if isinstance(file[name], h5py.Dataset):
                file.create_dataset(name, data=file.pop(name)[...], **options)
    return [*models, path.read_bytes()]


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Overwrite, insert and delete parts of a file, and sometimes cut it off."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16, 64])):
        start, other = draw.randrange(len(data)), draw.randrange(len(data))
        length = draw.choice([1, 2, 4, 8, 64, 512])
        constant = bytes([draw.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])]) * length
        piece = draw.choice(
            [draw.randbytes(length), constant, data[other : other + length], b""]
        )
        replaced = draw.choice([len(piece), len(piece), length, 0])
        data[start : start + replaced] = piece
    if draw.random() < 0.1:
        del data[draw.randrange(len(data)) :]
    return bytes(data)


def mutate_config(content: bytes, draw: random.Random, path: Path) -> bytes:
    """Change values in a model file's configuration, which stays JSON."""
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        layers = config["config"]["layers"]
        for _ in range(draw.choice([1, 1, 2, 4])):
            layer = draw.choice(layers)
            match draw.randrange(10):
                case 0:
                    layers.insert(draw.randrange(len(layers) + 1), draw.choice(layers))
                case 1:
                    layers.remove(layer)
                case 2:
                    kinds = [*utils.LAYERS, "Lambda", "LSTM"]
                    layer["class_name"] = draw.choice(kinds)
                case _:
                    name = draw.choice([*layer["config"], "unheard_of"])
                    layer["config"][name] = draw.choice(STRANGE)
        file.attrs["model_config"] = json.dumps(config)
    return path.read_bytes()


def answer(read: Callable, path: Path, documented: type[Exception]) -> str:
    """Read a file, and say what came out."""
    signal.alarm(SECONDS)
    try:
        read(path)
        text = "read"
    except documented as error:
        text = "refused in several lines" if "\n" in str(error) else "refused"
    except BaseException as error:
        text = repr(error)
    signal.alarm(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return "took more than a gigabyte" if peak > KILOBYTES else text


def read_mutants(kind: str, seeds: list[int], answers: Connection) -> None:
    """Make a mutant from each seed, read it, and send what came out."""
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff writes its own lines there
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "mutant.h5")
        if kind == "images":
            originals, read, documented = make_images(path), utils.read_pixels, OSError
        else:
            originals, read = make_models(path), utils.load_model
            documented = utils.UserError
        for content in originals:  # what is slow the first time is not counted
            path.write_bytes(content)
            read(path)
        # What hangs in C hears nothing but the default: to die.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        for seed in seeds:
            draw = random.Random(seed)
            content = draw.choice(originals)
            if kind == "models" and draw.random() < 0.5:
                content = mutate_config(content, draw, path)
            else:
                content = mutate(content, draw)
            path.write_bytes(content)
            answers.send(answer(read, path, documented))


def fuzz(kind: str, seeds: list[int]) -> collections.Counter:
    """Read a mutant of each seed in a process, which is replaced when it dies.

    Returns:
        How often each answer came.
    """
    counts = collections.Counter()
    while seeds:
        receiver, sender = SPAWN.Pipe(duplex=False)
        arguments = kind, seeds[:SEEDS], sender
        process = SPAWN.Process(target=read_mutants, args=arguments)
        process.start()
        sender.close()
        found = []
        with contextlib.suppress(EOFError):
            while True:
                found.append(receiver.recv())
        process.join()
        if process.exitcode > 0:
            sys.exit(f"{kind}: the process failed before or after reading a mutant")
        if len(found) < len(seeds[:SEEDS]):
            found.append(f"died of {signal.Signals(-process.exitcode).name}")
        for seed, text in zip(seeds, found, strict=False):
            if text not in ("read", "refused"):
                print(f"{kind}, seed {seed}: {text}", flush=True)
        counts.update(found)
        seeds = seeds[len(found) :]
    return counts


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="mutants")
    parser.add_argument("--models", type=int, default=2_000, help="mutants")
    args = parser.parse_args()
    bad = False
    for kind in ("images", "models"):
        seeds = list(range(getattr(args, kind)))
        with ThreadPoolExecutor() as pool:
            halves = pool.map(fuzz, [kind, kind], [seeds[::2], seeds[1::2]])
            answers = sum(halves, collections.Counter())
        print(f"{kind}: {dict(answers)}", flush=True)
        bad |= not answers.keys() <= {"read", "refused"}
    sys.exit(bad)


if __name__ == "__main__":
    main()
