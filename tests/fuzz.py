"""Feed mutated image and model files to the readers, and look at what they answer.

    python tests/fuzz.py

Each mutant is read or refused with the documented error, within two seconds and a
gigabyte of memory, in a process that survives it; the script ends with 1 otherwise.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

import h5py
import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

SECONDS, GIGABYTE = 2, 2**30


def make_images() -> list[bytes]:
    """Return small image files of several kinds, most with EXIF and profile."""
    noise = np.random.default_rng(1).integers(0, 256, (40, 56, 3), np.uint8)
    image = Image.fromarray(noise).resize((112, 80))
    exif = Image.Exif()
    exif[0x0112] = 6
    exif[0x010E] = "a description"
    images = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "image")
        for mode, kind, options in [
            ("L", "JPEG", {}),
            ("RGB", "JPEG", {"progressive": True}),
            ("CMYK", "JPEG", {"restart_marker_rows": 1}),
            ("1", "PNG", {}),
            ("P", "PNG", {"transparency": 0}),
            ("I;16", "PNG", {}),
            ("RGBA", "PNG", {"compress_level": 0}),
            ("RGB", "WEBP", {}),
            ("RGBA", "WEBP", {"lossless": True}),
            ("RGB", "AVIF", {"quality": 30}),
            ("RGB", "HEIF", {"quality": 30}),
            ("RGB", "TIFF", {"compression": "tiff_lzw"}),
            ("CMYK", "TIFF", {}),
            ("P", "GIF", {}),
            ("RGB", "JPEG2000", {}),
            ("RGB", "BMP", {}),
        ]:
            picture = image.convert("L" if mode == "I;16" else mode).convert(mode)
            picture.save(path, kind, exif=exif, icc_profile=bytes(200), **options)
            images.append(path.read_bytes())
        frames = [image.rotate(angle) for angle in (90, 180)]
        image.save(path, "WEBP", save_all=True, append_images=frames)
        images.append(path.read_bytes())
    return images


def make_models() -> list[bytes]:
    """Return small model files, one of them compressed."""
    import train

    models = []
    with tempfile.TemporaryDirectory() as folder:
        for filters in ([2], [2, 3]):
            model = train.build_model((48, 48, 1), 2, filters, 2)
            path = Path(folder, "model.h5")
            attributes = {"class_names": ["happy", "sad"], "rescale": utils.RESCALE}
            train.save_model(model, path, attributes)
            models.append(path.read_bytes())
        options = {"compression": "gzip", "shuffle": True}
        with h5py.File(path, "r+") as file:
            names: list[str] = []
            file.visit(names.append)
            for name in names:
                if isinstance(file[name], h5py.Dataset):
                    file.create_dataset(name, data=file.pop(name)[...], **options)
        models.append(path.read_bytes())
    return models


def mutate(content: bytes, draw: random.Random) -> bytes:
    """Change bytes, cut, repeat, insert or overwrite parts of a file."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 4, 16, 64])):
        start = draw.randrange(len(data) or 1)
        length = min(draw.choice([1, 2, 4, 8, 64, 512]), len(data) - start)
        match draw.randrange(7):
            case 0 | 1:
                data[start : start + length] = draw.randbytes(length)
            case 2:
                value = draw.choice([0, 1, 0x7F, 0x80, 0xFE, 0xFF])
                data[start : start + length] = bytes([value]) * length
            case 3:
                if data:
                    data[start] ^= 1 << draw.randrange(8)
            case 4:
                data[start:start] = draw.randbytes(length)
            case 5:
                other = draw.randrange(len(data) or 1)
                data[start : start + length] = data[other : other + length]
            case 6:
                if draw.random() < 0.2:
                    del data[start:]
                else:
                    del data[start : start + length]
    return bytes(data)


def mutate_config(content: bytes, draw: random.Random, path: Path) -> bytes:
    """Change values in a model file's configuration, which stays JSON."""
    strange = [None, True, -1, 0, 10**9, 10**30, 0.5, "x", "", [], [0, 0], {}, [None]]
    path.write_bytes(content)
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        for _ in range(draw.choice([1, 1, 2, 4])):
            layers = config["config"]["layers"]
            layer = draw.choice(layers)
            name = draw.choice([*layer["config"], "class_name", "unheard_of"])
            if name == "class_name":
                layer["class_name"] = draw.choice([*utils.LAYERS, "Lambda", "LSTM"])
            elif draw.random() < 0.1:
                layers.insert(draw.randrange(len(layers) + 1), draw.choice(layers))
            elif draw.random() < 0.1:
                layers.remove(layer)
            else:
                layer["config"][name] = draw.choice(strange)
            if not layers:
                break
        file.attrs["model_config"] = json.dumps(config)
    return path.read_bytes()


def read_mutants(kind: str, seeds: list[int], path: Path, findings: Path) -> None:
    """Make a mutant from each seed, read it, and write down what came out."""
    warnings.simplefilter("ignore")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)  # libtiff writes its own lines there
    if kind == "images":
        originals, read, documented = make_images(), utils.read_pixels, OSError
    else:
        originals, read, documented = make_models(), utils.load_model, utils.UserError
    for content in originals:  # what is slow the first time is not counted
        path.write_bytes(content)
        read(path)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # what hangs in C hears no other
    with open(findings, "a") as file:
        for seed in seeds:
            draw = random.Random(seed)
            content = draw.choice(originals)
            if kind == "models" and draw.random() < 0.5:
                content = mutate_config(content, draw, path)
            else:
                content = mutate(content, draw)
            path.write_bytes(content)
            print(seed, "died", file=file, flush=True)  # unless a next line says better
            begin = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read(path)
                answer = "read"
            except documented as error:
                several = "\n" in str(error)
                answer = "refused in several lines" if several else "refused"
            except BaseException as error:
                answer = f"{type(error).__name__}: {error}".replace("\n", " ")
            signal.setitimer(signal.ITIMER_REAL, 0)
            took = time.monotonic() - begin
            peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            if took > SECONDS:
                answer = f"took {took:.1f} s"
            elif peak > GIGABYTE:
                answer = f"took {peak / GIGABYTE:.1f} GB"
            print(seed, answer, file=file, flush=True)


def fuzz(kind: str, count: int, folder: Path) -> dict[str, int]:
    """Read so many mutants in two processes; one that dies is replaced.

    Returns:
        How often each answer came.
    """
    context = multiprocessing.get_context("spawn")
    answers: dict[int, str] = {}
    while len(answers) < count:
        left = [seed for seed in range(count) if seed not in answers]
        processes = {}
        for worker in range(2):
            # A process keeps what it read, as predict.py does, but not for ever.
            seeds, findings = left[worker::2][:2000], folder / f"{kind}{worker}"
            arguments = kind, seeds, folder / f"{kind}{worker}.h5", findings
            process = context.Process(target=read_mutants, args=arguments)
            process.start()
            processes[findings] = process
        for findings, process in processes.items():
            process.join()
            for line in findings.read_text().splitlines():
                seed, _, answer = line.partition(" ")
                answers[int(seed)] = answer
        if len(answers) == count - len(left):
            sys.exit(f"{kind}: the processes die at once")
        print(f"{kind}: {len(answers)} of {count}", file=sys.stderr)
    for seed, answer in answers.items():
        if answer not in ("read", "refused"):
            print(f"{kind}, seed {seed}: {answer}")
    return dict(collections.Counter(answers.values()))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="mutants")
    parser.add_argument("--models", type=int, default=2_000, help="mutants")
    args = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"
    bad = False
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("images", "models"):
            answers = fuzz(kind, getattr(args, kind), Path(folder))
            print(f"{kind}: {answers}", flush=True)
            bad |= not answers.keys() <= {"read", "refused"}
    sys.exit(bad)


if __name__ == "__main__":
    main()
