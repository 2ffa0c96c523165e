"""Measure speed and memory, each contender in a process of its own.

    python tests/benchmark.py speed    # training: 10 minutes; needs data/train
    python tests/benchmark.py memory   # training: 10 minutes, 2 GB of disk
    python tests/benchmark.py predict  # prediction: 5 minutes; needs data/test
    python tests/benchmark.py faces    # large face crops: 10 minutes; needs data/test

Contenders take turns, several times over, so that a drifting machine hits all alike;
what is printed are medians.
"""

import argparse
import collections
import datetime
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 12  # that a contender is measured in each of its turns
CLIP_FRAMES = 600  # of each video
WARM_UP = 3  # steps that are not counted
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes


def rate(step: Callable[[], Any], amount: float) -> float:
    """Return amount per second of a function that is called again and again."""
    for _ in range(WARM_UP):
        step()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        step()
        calls += 1
    return amount * calls / (time.perf_counter() - begin)


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
        float(model.train_function(batches)["loss"])

    return {"images/s": rate(step, args.batch_size * model.steps_per_execution)}


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


class KerasNetwork:
    """The model in models/ on Keras and TensorFlow, with the views of predict.py."""

    size = 48

    def __init__(self) -> None:
        import train

        path = ROOT / train.utils.MODEL_PATH
        self.model = train.keras.saving.load_model(path, compile=False)

    def predict(self, faces: np.ndarray) -> np.ndarray:
        """Return class probabilities, (n, num_classes)."""
        import utils

        views = utils.make_views(faces)
        logs = np.log(self.model.predict_on_batch(np.concatenate(views)))
        means = np.exp(np.mean(np.split(logs, len(views)), axis=0))
        return means / means.sum(axis=1, keepdims=True)


def predict_rate(network: Any, paths: list[str], faces: str) -> dict[str, Any]:
    """Return the files a second that predict.py classifies, after some to warm up."""
    import predict

    read = functools.partial(predict.read_faces, faces=faces)
    list(predict.predict_files(network, paths[:130], read))
    begin = time.perf_counter()
    list(predict.predict_files(network, paths, read))
    return {"images/s": len(paths) / (time.perf_counter() - begin)}


def crops(on_keras: bool = False) -> dict[str, Any]:
    """Classify the face crops of data/test from files."""
    import utils

    paths = list(utils.list_files(ROOT / "data" / "test"))
    network = utils.load_model(ROOT / utils.MODEL_PATH)
    return predict_rate(KerasNetwork() if on_keras else network, paths, "never")


def photos() -> dict[str, Any]:
    """Find and classify the portrait in data/, a hundred times, 1024 pixels a side."""
    from PIL import Image

    import utils

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/portrait.jpg"
        with Image.open(ROOT / "data" / "astronaut.jpg") as image:
            image.resize((1024, 1024)).save(path)
        network = utils.load_model(ROOT / utils.MODEL_PATH)
        return predict_rate(network, [path] * 100, "always")


TRAINING = {
    "default network, batch in memory": "in_memory()",
    "default network, train.py's pipeline": "pipeline()",
    "2,000 faces of 48 x 48, later epochs": "pipeline('{}/faces', 2000)",
    "2,000 photos of 1600 x 1200, later epochs": "pipeline('{}/photos', 2000)",
}
PREDICTION = {
    "crops of data/test, Keras on TensorFlow": "crops(on_keras=True)",
    "crops of data/test": "crops()",
    "photos of 1024 x 1024 pixels": "photos()",
}
CROP = "data/demo/test/happy/03.png"
COMMANDS = {
    'python -c "import tensorflow"': ["-c", "import tensorflow"],
    "predict.py --image <crop>": ["predict.py", "--image", CROP],
    "predict.py --image <portrait>": ["predict.py", "--image", "data/astronaut.jpg"],
}


def in_process(code: str) -> dict[str, Any]:
    """Run an expression of this module in a new process, as a user's would be."""
    environment = {k: v for k, v in os.environ.items() if k[:3] != "TF_"}
    result = subprocess.run(
        [sys.executable, "-c", f"import benchmark, json; print(json.dumps({code}))"],
        cwd=ROOT / "tests",
        env=environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        sys.exit(f"{code}: {result.stderr}")
    return json.loads(result.stdout.splitlines()[-1])


def peak_memory() -> float:
    """Return the most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20


def measure(code: str) -> dict[str, Any]:
    """Measure a contender in a new process, and that one's memory."""
    return in_process(f"benchmark.{code} | {{'memory': benchmark.peak_memory()}}")


def print_medians(measured: dict[str, list[dict[str, float]]]) -> list[float]:
    """Print the medians of all contenders; return their images a second."""
    print(f"{'':42}       s  images/s  peak memory")
    rates = []
    for name, runs in measured.items():
        figures = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rates.append(figures.get("images/s", 0))
        columns = [
            f"{figures[k]:.2f}" if k in figures else "" for k in ("s", "images/s")
        ]
        print(f"{name:42}{columns[0]:>8}{columns[1]:>10}{figures['memory']:10.0f} MB")
    return rates


def speed(turns: int) -> None:
    """Print how fast networks train."""
    print(f"{in_process('benchmark.describe_machine()')}; medians of {turns} turns\n")
    measured = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        draw_photos(Path(folder))
        for _ in range(turns):
            for name, code in TRAINING.items():
                measured[name].append(measure(code.format(folder)))
    memory, pipeline, faces, photos = print_medians(measured)
    print(f"\npipeline / memory: {pipeline / memory:.3f}")
    print(f"photos / faces: {photos / faces:.3f}")


def run_command(words: list[str]) -> dict[str, float]:
    """Run a command; return its seconds, and its peak memory in MB."""
    begin = time.perf_counter()
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, **silent)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0
    seconds = time.perf_counter() - begin
    return {"s": seconds, "memory": usage.ru_maxrss * RSS_UNIT / 2**20}


def draw_clip(path: str, faces: int) -> list[str]:
    """Write a video of moving faces; return the command that looks at each frame."""
    import imageio_ffmpeg
    from PIL import Image

    size, side = (640, 480), 300 if faces == 1 else 170
    portrait = Image.open(ROOT / "data" / "astronaut.jpg").resize((side, side))
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
    print(f"{in_process('benchmark.describe_machine()')}; medians of {turns} turns\n")
    measured = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        clips = {
            f"frames of 640 x 480 pixels, faces: {faces}": draw_clip(
                f"{folder}/{faces}.mp4", faces
            )
            for faces in (1, 5)
        }
        for _ in range(turns):
            for name, words in COMMANDS.items():
                measured[name].append(run_command(words))
            for name, code in PREDICTION.items():
                measured[name].append(measure(code))
            for name, words in clips.items():
                figures = run_command(words)
                figures["images/s"] = CLIP_FRAMES / figures["s"]
                measured[name].append(figures)
    rates = print_medians(measured)
    print(f"\ncrops / Keras: {rates[4] / rates[3]:.3f}")


def describe_machine() -> str:
    """Name date, processor and versions."""
    import train

    lines = train.CPU_INFO.read_text().splitlines()
    about = dict(line.split(":", 1) for line in lines if ":" in line)
    about = {name.strip(): value.strip() for name, value in about.items()}
    processor = [about[n] for n in ("model name", "cpu family", "model")]
    return (
        f"{datetime.date.today()}, {os.cpu_count()} cores, "
        "{} family {} model {}".format(*processor)
        + f", {train.choose_precision()}\nPython {platform.python_version()}, "
        f"TensorFlow {train.tf.__version__}, Keras {train.keras.__version__}"
    )


def draw_tree(folder: Path, images: int) -> None:
    """Write so many different small images, and a few to test on."""
    from PIL import Image

    generator = np.random.default_rng(1)
    for part, count in (("train", images), ("test", 60)):
        for emotion in range(6):
            place = folder / part / f"emotion {emotion}"
            place.mkdir(parents=True)
            for number in range(count // 6):
                pixels = generator.integers(0, 256, (48, 48), np.uint8)
                Image.fromarray(pixels).save(place / f"image_{number:08}.png")


class Memory(threading.Thread):
    """Watch how much anonymous memory, and how much of mapped files, is in use."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peaks = {"RssAnon": 0.0, "RssFile": 0.0}

    def run(self) -> None:
        """Note the peaks, in MB, ten times a second."""
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                name, _, value = line.partition(":")
                if name in self.peaks:
                    peak = int(value.split()[0]) / 1024
                    self.peaks[name] = max(self.peaks[name], peak)
            time.sleep(0.1)


def train_once(folder: str) -> dict[str, float]:
    """Train the smallest network on a tree for an epoch, as users do."""
    import train

    watched = Memory()
    watched.start()
    names = [f"emotion {emotion}" for emotion in range(6)]
    words = ["--data-dir", folder, "--model-path", f"{folder}/model.h5"]
    words += ["--epochs", "1", "--filters", "1", "--dense-units", "1"]
    begin = time.perf_counter()
    train.main([*words, "--classes", *names])
    return watched.peaks | {"seconds": time.perf_counter() - begin}


def memory() -> None:
    """Print what time and memory grow by from 3,000 to 300,000 images."""
    print(f"{in_process('benchmark.describe_machine()')}\n")
    peaks = []
    for images in (3_000, 300_000):
        with tempfile.TemporaryDirectory() as folder:
            draw_tree(Path(folder), images)
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
    paths = list(utils.list_files(ROOT / "data" / "test"))
    paths = [path for path in paths if Path(path).parent.name in network.class_names]
    for size in (96, 224):

        def read(path: str, find: Callable, size: int = size) -> list:
            return find(utils.open_image(path).resize((size, size), Image.BICUBIC))

        for name, find in {
            "never": predict.whole_face,
            "auto": predict.find_faces,
        }.items():
            reader = functools.partial(read, find=find)
            found, right = 0, 0
            for path, result in predict.predict_files(network, paths, reader):
                if result:
                    _, probabilities = max(result, key=lambda pair: pair[0].box[2])
                    emotion = network.class_names[probabilities.argmax()]
                    found, right = (
                        found + 1,
                        right + (emotion == Path(path).parent.name),
                    )
            print(
                f"{len(paths)} images of {size} pixels, --faces {name}: no face in "
                f"{1 - found / len(paths):.1%}, right {right / len(paths):.1%}"
            )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["speed", "memory", "predict", "faces"])
    parser.add_argument("--turns", type=int, default=3, help="times each is measured")
    args = parser.parse_args()
    runs = {"memory": memory, "faces": faces}
    runs["predict"] = functools.partial(prediction, args.turns)
    runs["speed"] = functools.partial(speed, args.turns)
    runs[args.what]()


if __name__ == "__main__":
    main()
