"""Measure speed and memory, each contender in a process of its own.

    python tests/benchmark.py speed    # training: 10 minutes; needs data/train
    python tests/benchmark.py memory   # training: 10 minutes, 2 GB of disk
    python tests/benchmark.py predict  # prediction: 5 minutes; needs data/test
    python tests/benchmark.py faces    # large face crops: 10 minutes; needs data/test

Contenders take turns, several times over, so that a drifting machine hits all alike;
what is printed are medians.
"""

import argparse
import datetime
import itertools
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 12  # that steps are measured in each turn
CLIP_FRAMES = 600  # of each video
PORTRAIT = "data/astronaut.jpg"
MADE_UP = [f"emotion {number}" for number in range(6)]


def default_model() -> tuple[Any, argparse.Namespace]:
    """Build the network that python train.py --epochs 15 trains."""
    import train

    args = train.parse_args(["--epochs", "15"])
    args.precision = train.choose_precision()
    dropout = train.choose_regularization(args, 28_273)["dropout"]
    return train.make_model(args, steps=10_000, dropout=dropout), args


def in_memory() -> dict[str, Any]:
    """Train the default network on one batch, over and over, as fit's loop does."""
    model, args = default_model()
    import tensorflow as tf

    generator = np.random.default_rng(1)
    faces = generator.random((args.batch_size, 48, 48, 1), np.float32)
    labels = np.eye(6, dtype=np.float32)[generator.integers(0, 6, args.batch_size)]
    batches = iter(tf.data.Dataset.from_tensors((faces, labels)).repeat())
    model.make_train_function()

    def step() -> None:
        float(model.train_function(batches)["loss"])  # a number: the step is done

    for _ in range(3):  # to warm up
        step()
    begin, steps = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        step()
        steps += model.steps_per_execution
    return {"images/s": steps * args.batch_size / (time.perf_counter() - begin)}


def pipeline(folder: str = "", images: int = 12_800) -> dict[str, Any]:
    """Train the default network on images of a folder, as train.py does."""
    import train  # before Keras: it sets TensorFlow up

    folder = Path(folder or ROOT / "data" / "train")
    split, _ = train.utils.index_folder(folder, train.CLASS_NAMES)
    split = train.Split(split.table.sample(images, random_state=1), split.pixels)
    model, args = default_model()
    batches, _ = train.make_iterators(split, split, args)
    times: list[float] = []
    epochs = train.keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, logs: times.append(time.perf_counter()),
        on_train_end=lambda logs: times.append(time.perf_counter()),
    )
    callbacks = [batches.follow_epochs(), epochs]
    model.fit(batches, epochs=3, shuffle=False, verbose=0, callbacks=callbacks)
    images = 2 * len(batches) * batches.batch_size  # not those of the first epoch
    return {"images/s": images / (times[-1] - times[1])}


def draw_photos(folder: Path) -> None:
    """Write 2,000 training faces as they are, and as photos of 1600 x 1200 pixels."""
    from PIL import Image

    import train

    for emotion in train.CLASS_NAMES:
        paths = sorted((ROOT / "data" / "train" / emotion).iterdir())[:334]
        for size, name in ((48, 48), "faces"), ((1600, 1200), "photos"):
            place = folder / name / emotion
            place.mkdir(parents=True)
            for path in paths:
                with Image.open(path) as image:
                    image.resize(size).save(place / path.name)


def predict_rate(network: Any, paths: list[str], faces: str) -> dict[str, Any]:
    """Return the files a second that predict.py classifies, after some to warm up."""
    import predict

    read = partial(predict.read_faces, faces=faces)
    list(predict.predict_files(network, paths[:130], read))
    begin = time.perf_counter()
    list(predict.predict_files(network, paths, read))
    return {"images/s": len(paths) / (time.perf_counter() - begin)}


def crops(on_keras: bool = False) -> dict[str, Any]:
    """Classify the face crops of data/test from files."""
    import utils

    paths = list(utils.list_files(ROOT / "data" / "test"))
    network = utils.load_model(ROOT / utils.MODEL_PATH)
    if on_keras:  # the views and their mean stay those of predict.py
        import train

        model = train.keras.saving.load_model(ROOT / utils.MODEL_PATH, compile=False)
        network.compiled = lambda faces: [model.predict_on_batch(faces)]
    return predict_rate(network, paths, "never")


def photos() -> dict[str, Any]:
    """Find and classify the portrait in data/, a hundred times, 1024 pixels a side."""
    from PIL import Image

    import utils

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/portrait.jpg"
        with Image.open(ROOT / PORTRAIT) as image:
            image.resize((1024, 1024)).save(path)
        network = utils.load_model(ROOT / utils.MODEL_PATH)
        return predict_rate(network, [path] * 100, "always")


def in_process(code: str) -> dict[str, Any]:
    """Run an expression of this module in a new process, as a user's would be."""
    result = subprocess.run(
        [sys.executable, "-c", f"import benchmark, json; print(json.dumps({code}))"],
        cwd=ROOT / "tests",
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{code}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(code: str) -> dict[str, float]:
    """Measure a contender in a new process, and that one's memory."""
    return in_process(f"benchmark.{code} | {{'memory': benchmark.peak_memory()}}")


def take_turns(turns: int, contenders: dict[str, Callable[[], dict]]) -> list[float]:
    """Measure all contenders, print medians, and return their images a second."""
    print(f"{in_process('benchmark.describe_machine()')}; medians of {turns} turns\n")
    runs = [[run() for run in contenders.values()] for _ in range(turns)]
    print(f"{'':42}       s  images/s  peak memory")
    rates = []
    for name, measured in zip(contenders, zip(*runs, strict=True), strict=True):
        figures = {k: statistics.median(m[k] for m in measured) for k in measured[0]}
        rates.append(figures.get("images/s", 0))
        columns = [
            f"{figures[k]:.2f}" if k in figures else "" for k in ("s", "images/s")
        ]
        print(f"{name:42}{columns[0]:>8}{columns[1]:>10}{figures['memory']:10.0f} MB")
    return rates


def speed(turns: int) -> None:
    """Print how fast networks train."""
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(Path(folder))
        faces, photos = (f"pipeline('{folder}/{n}', 2000)" for n in ("faces", "photos"))
        contenders = {
            "default network, batch in memory": partial(measure, "in_memory()"),
            "default network, train.py's pipeline": partial(measure, "pipeline()"),
            "2,000 faces of 48 x 48, later epochs": partial(measure, faces),
            "2,000 photos of 1600 x 1200, later epochs": partial(measure, photos),
        }
        memory, pipeline, faces, photos = take_turns(turns, contenders)
    print(f"\npipeline / memory: {pipeline / memory:.3f}")
    print(f"photos / faces: {photos / faces:.3f}")


def run_command(words: list[str], images: int = 0) -> dict[str, float]:
    """Run a command; return its seconds, peak memory in MB, and images a second."""
    begin = time.perf_counter()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, **silent)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    figures = {"s": time.perf_counter() - begin}
    if images:
        figures["images/s"] = images / figures["s"]
    return figures | {"memory": usage.ru_maxrss / 1024}


def draw_clip(path: str, faces: int) -> list[str]:
    """Write a video of moving faces; return the command that looks at each frame."""
    import imageio_ffmpeg
    from PIL import Image

    size, side = (640, 480), 300 if faces == 1 else 170
    portrait = Image.open(ROOT / PORTRAIT).resize((side, side))
    writer = imageio_ffmpeg.write_frames(path, size, fps=30)
    writer.send(None)
    for number in range(CLIP_FRAMES):
        frame = Image.new("RGB", size, "gray")
        for face in range(faces):
            x = 115 * face if faces > 1 else 170 + int(60 * np.sin(number / 40))
            y = 40 + face % 2 * 180 + int(10 * np.cos(number / 30))
            frame.paste(portrait, (x, y))
        writer.send(frame.tobytes())
    writer.close()
    return ["predict.py", "--image", path, "--fps", "30", "--format", "csv"]


def prediction(turns: int) -> None:
    """Print how long predictions take."""
    import_it, look = ["-c", "import tensorflow"], ["predict.py", "--image"]
    crop, keras = "data/demo/test/happy/03.png", "crops(on_keras=True)"
    contenders = {
        'python -c "import tensorflow"': partial(run_command, import_it),
        "predict.py --image <crop>": partial(run_command, [*look, crop]),
        "predict.py --image <portrait>": partial(run_command, [*look, PORTRAIT]),
        "crops of data/test, Keras on TensorFlow": partial(measure, keras),
        "crops of data/test": partial(measure, "crops()"),
        "photos of 1024 x 1024 pixels": partial(measure, "photos()"),
    }
    with tempfile.TemporaryDirectory() as folder:
        for faces in (1, 5):
            words = draw_clip(f"{folder}/{faces}.mp4", faces)
            name = f"frames of 640 x 480 pixels, faces: {faces}"
            contenders[name] = partial(run_command, words, CLIP_FRAMES)
        rates = take_turns(turns, contenders)
    print(f"\ncrops / Keras: {rates[4] / rates[3]:.3f}")


def describe_machine() -> str:
    """Name date, processor and versions."""
    import train

    about = dict(re.findall(r"^(.+?)\s*: (.*)$", train.CPU_INFO.read_text(), re.M))
    processor = "{model name} family {cpu family} model {model}".format_map(about)
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores, {processor}, "
        f"{train.choose_precision()}\nPython {platform.python_version()}, "
        f"TensorFlow {train.tf.__version__}, Keras {train.keras.__version__}"
    )


def watch_memory(peaks: dict[str, float]) -> None:
    """Note the peaks of this process's memory, in MB, ten times a second, for ever."""
    while True:
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], int(value.split()[0]) / 1024)
        time.sleep(0.1)


def train_once(folder: str) -> dict[str, float]:
    """Train the smallest network on a tree for an epoch, as users do."""
    import train

    peaks = {"RssAnon": 0.0, "RssFile": 0.0}  # anonymous memory, and mapped files
    threading.Thread(target=watch_memory, args=[peaks], daemon=True).start()
    words = ["--data-dir", folder, "--model-path", f"{folder}/model.h5"]
    words += ["--epochs", "1", "--filters", "1", "--dense-units", "1"]
    begin = time.perf_counter()
    train.main([*words, "--classes", *MADE_UP])
    return peaks | {"seconds": time.perf_counter() - begin}


def memory() -> None:
    """Print what time and memory grow by from 3,000 to 300,000 images."""
    from conftest import make_tree

    print(f"{in_process('benchmark.describe_machine()')}\n")
    peaks = []
    for images in (3_000, 300_000):
        with tempfile.TemporaryDirectory() as folder:
            make_tree(Path(folder), MADE_UP, images // len(MADE_UP), 10)
            figures = in_process(f"benchmark.train_once({folder!r})")
        peaks.append(figures["RssAnon"])
        print(
            f"{images:7} images: {figures['RssAnon']:5.0f} MB of anonymous memory, "
            f"{figures['RssFile']:5.0f} MB of files, {figures['seconds']:5.0f} s"
        )
    print(f"\nanonymous memory grows by {peaks[1] - peaks[0]:.0f} MB")


def faces() -> None:
    """Print what becomes of the face crops of data/test when they are scaled up."""
    from PIL import Image

    import predict
    import utils

    network = utils.load_model(ROOT / utils.MODEL_PATH)
    names = network.class_names
    paths = list(utils.list_files(ROOT / "data" / "test"))
    paths = [path for path in paths if Path(path).parent.name in names]
    finders = {"never": predict.whole_face, "auto": predict.find_faces}
    for size, (faces, find) in itertools.product((96, 224), finders.items()):

        def read(path: str, find: Callable = find, size: int = size) -> list:
            return find(utils.open_image(path).resize((size, size), Image.BICUBIC))

        found = right = 0
        for path, result in predict.predict_files(network, paths, read):
            if result:
                _, probabilities = max(result, key=lambda pair: pair[0].box[2])
                found += 1
                right += names[probabilities.argmax()] == Path(path).parent.name
        print(
            f"{len(paths)} images of {size} pixels, --faces {faces}: no face in "
            f"{1 - found / len(paths):.1%}, right {right / len(paths):.1%}"
        )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["speed", "memory", "predict", "faces"])
    parser.add_argument("--turns", type=int, default=3, help="times each is measured")
    args = parser.parse_args()
    match args.what:
        case "speed":
            speed(args.turns)
        case "memory":
            memory()
        case "predict":
            prediction(args.turns)
        case "faces":
            faces()


if __name__ == "__main__":
    main()
