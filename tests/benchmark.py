"""Measure speed and memory, each contender in a process of its own.

    python tests/benchmark.py speed    # training: 15 minutes; needs data/train
    python tests/benchmark.py memory   # training: 10 minutes, 2 GB of disk
    python tests/benchmark.py predict  # prediction: 5 minutes; needs data/test
    python tests/benchmark.py faces    # large face crops: 10 minutes; needs data/test

Contenders take turns, several times over, so that a drifting machine hits all alike;
what is printed are medians.
"""

import argparse
import datetime
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from make_demo_data import write_clip
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

CLIP_FRAMES = 600  # of each video
PORTRAIT = "data/astronaut.jpg"


# --- Contenders: each returns its images a second ---
def train_network(
    folder: str = "data/train", images: int = 12_800, in_memory: bool = False
) -> float:
    """Train the default network on images of a folder, or on one batch of them."""
    import train

    split, _ = train.utils.index_folder(Path(folder), train.CLASS_NAMES)
    split = train.Split(split.table.sample(images, random_state=1), split.pixels)
    args = train.parse_args(["--epochs", "15"])
    args.precision = train.choose_precision()
    dropout = train.choose_regularization(args, 28_273)["dropout"]
    model = train.make_model(args, steps=10_000, dropout=dropout)
    batches, _ = train.make_iterators(split, split, args)
    data, callbacks, steps = batches, [batches.follow_epochs()], len(batches)
    if in_memory:
        data, callbacks = train.tf.data.Dataset.from_tensors(batches[0]).repeat(), []
    ends: list[float] = []
    note = train.keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: ends.append(time.perf_counter())
    )
    options = {"epochs": 3, "steps_per_epoch": steps, "shuffle": False, "verbose": 0}
    model.fit(data, callbacks=[*callbacks, note], **options)
    return 2 * steps * batches.batch_size / (ends[-1] - ends[0])


def classify(folder: str, faces: str, on_keras: bool = False) -> float:
    """Classify the pictures in a folder, as predict.py does."""
    import predict
    import utils

    paths = list(utils.list_files(Path(folder)))
    network = utils.load_model(utils.MODEL_PATH)
    if on_keras:  # the views and their mean stay those of predict.py
        import train

        model = train.keras.saving.load_model(utils.MODEL_PATH, compile=False)
        network.compiled = lambda faces: [model.predict_on_batch(faces)]
    read = partial(predict.read_faces, faces=faces)
    list(predict.predict_files(network, paths[:130], read))  # to warm up
    begin = time.perf_counter()
    list(predict.predict_files(network, paths, read))
    return len(paths) / (time.perf_counter() - begin)


# --- Processes and tables ---
def run(words: list[str]) -> tuple[str, dict[str, float]]:
    """Run Python in a new process; return its output, seconds and peak memory in MB.

    This process stays small: Linux counts its memory as the new one's, too.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{words}: {output}")
    seconds = time.perf_counter() - begin
    return output, {"s": seconds, "memory": usage.ru_maxrss / 1024}


def measure(contender: str | list[str]) -> dict[str, float]:
    """Measure the words of a command from start to end, or a call in this module."""
    if isinstance(contender, list):
        _, figures = run(contender)
        if "--fps" in contender:
            figures["images/s"] = CLIP_FRAMES / figures["s"]
        return figures
    output, figures = run(["-c", f"import benchmark; print(benchmark.{contender})"])
    rate = float(output.splitlines()[-1])
    return {"images/s": rate, "memory": figures["memory"]}


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


def take_turns(turns: int, contenders: dict[str, str | list[str]]) -> list[float]:
    """Measure all contenders, print medians, and return their images a second."""
    machine, _ = run(["-c", "import benchmark; print(benchmark.describe_machine())"])
    print(f"{machine.rstrip()}; medians of {turns} turns\n")
    runs = [list(map(measure, contenders.values())) for _ in range(turns)]
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


# --- What is measured ---
def speed(turns: int) -> None:
    """Print how fast networks train, also on faces that are large photos."""
    with tempfile.TemporaryDirectory() as folder:
        for path in sorted((ROOT / "data" / "train").glob("*/*"))[::14]:
            for size, name in ((48, 48), "faces"), ((1600, 1200), "photos"):
                target = Path(folder, name, path.parent.name, path.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                Image.open(path).resize(size).save(target)
        train = f"train_network('{folder}/{{}}', 2000)"
        contenders = {
            "default network, batch in memory": "train_network(in_memory=True)",
            "default network, train.py's pipeline": "train_network()",
            "2,000 faces of 48 x 48, later epochs": train.format("faces"),
            "2,000 photos of 1600 x 1200, later epochs": train.format("photos"),
        }
        memory, pipeline, faces, photos = take_turns(turns, contenders)
    print(f"\npipeline / memory: {pipeline / memory:.3f}")
    print(f"photos / faces: {photos / faces:.3f}")


def draw_frames(faces: int) -> Iterator[Image.Image]:
    """Draw the frames of a video of one face or of five, which move."""
    side = 300 if faces == 1 else 170
    portrait = Image.open(ROOT / PORTRAIT).resize((side, side))
    for number in range(CLIP_FRAMES):
        frame = Image.new("RGB", (640, 480), "gray")
        for face in range(faces):
            x = 115 * face if faces > 1 else 170 + int(60 * np.sin(number / 40))
            y = 40 + face % 2 * 180 + int(10 * np.cos(number / 30))
            frame.paste(portrait, (x, y))
        yield frame


def prediction(turns: int) -> None:
    """Print how long predictions take."""
    look = ["predict.py", "--image"]
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        photos.mkdir()
        portrait = Image.open(ROOT / PORTRAIT).resize((1024, 1024))
        for number in range(100):
            portrait.save(photos / f"{number}.jpg")
        contenders = {
            'python -c "import tensorflow"': ["-c", "import tensorflow"],
            "predict.py --image <crop>": [*look, "data/demo/test/happy/03.png"],
            "predict.py --image <portrait>": [*look, PORTRAIT],
            "crops of data/test, Keras on TensorFlow": (
                "classify('data/test', 'never', on_keras=True)"
            ),
            "crops of data/test": "classify('data/test', 'never')",
            "photos of 1024 x 1024 pixels": f"classify('{photos}', 'always')",
        }
        for faces in (1, 5):
            clip = str(write_clip(Path(folder, f"{faces}.mp4"), draw_frames(faces), 30))
            words = [*look, clip, "--fps", "30", "--format", "csv"]
            contenders[f"frames of 640 x 480 pixels, faces: {faces}"] = words
        rates = take_turns(turns, contenders)
    print(f"\ncrops / Keras: {rates[4] / rates[3]:.3f}")


def memory() -> None:
    """Print what memory and time train.py takes for 3,000 and for 300,000 images."""
    from conftest import make_tree

    print(f"{describe_machine()}\n")
    names, anonymous = [f"emotion {number}" for number in range(6)], []
    for images in (3_000, 300_000):
        peaks = {"RssAnon": 0.0, "RssFile": 0.0}  # MB of anonymous and mapped memory
        with tempfile.TemporaryDirectory() as folder:
            make_tree(Path(folder), names, images // len(names), 10)
            words = ["train.py", "--data-dir", folder, "--classes", *names]
            words += ["--model-path", f"{folder}/model.h5", "--epochs", "1"]
            words += ["--filters", "1", "--dense-units", "1"]
            begin = time.perf_counter()
            process = subprocess.Popen(
                [sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL
            )
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                for name, value in re.findall(r"(Rss\w+):\s+(\d+)", status):
                    if name in peaks:
                        peaks[name] = max(peaks[name], int(value) / 1024)
                time.sleep(0.1)
            assert process.returncode == 0
        anonymous.append(peaks["RssAnon"])
        print(
            f"{images:7} images: {peaks['RssAnon']:5.0f} MB of anonymous memory, "
            f"{peaks['RssFile']:5.0f} MB of files, {time.perf_counter() - begin:5.0f} s"
        )
    print(f"\nanonymous memory grows by {anonymous[1] - anonymous[0]:.0f} MB")


def faces() -> None:
    """Print what becomes of the face crops of data/test when they are scaled up."""
    import predict
    import utils

    network = utils.load_model(ROOT / utils.MODEL_PATH)
    folders = utils.match_folders(ROOT / "data" / "test", network.class_names).values()
    paths = [path for folder in folders for path in utils.list_files(folder)]
    finders = {"never": predict.whole_face, "auto": predict.find_faces}

    def read(path: str, size: int, find: Callable) -> list:
        return find(utils.open_image(path).resize((size, size), Image.BICUBIC))

    for size in (96, 224):
        for name, find in finders.items():
            read_it, missed, right = partial(read, size=size, find=find), 0, 0
            for path, result in predict.predict_files(network, paths, read_it):
                if not result:
                    missed += 1
                    continue
                _, answer = max(result, key=lambda pair: pair[0].box[2])
                emotion = network.class_names[answer.argmax()]
                right += emotion == Path(path).parent.name
            print(
                f"{len(paths)} images of {size} pixels, --faces {name}: no face in "
                f"{missed / len(paths):.1%}, right {right / len(paths):.1%}"
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
