"""Measure speed and memory, each contender in a process of its own.

    python tests/benchmark.py speed    # training: 9 minutes; needs data/train
    python tests/benchmark.py memory   # training: 15 minutes, 1.5 GB of disk
    python tests/benchmark.py predict  # prediction: 5 minutes; needs data/test
    pip install torch                  # if PyTorch is to be compared, too

PyTorch has to be its build for CPUs: that for CUDA, 2.14.1, crashes beside TensorFlow.
Contenders take turns, several times over, so that a drifting machine hits all alike;
what is printed are medians. A step is forward and backward pass and update. Its
floating-point operations are counted as three times those of the forward pass's
convolutions and dense layers, a multiplication and an addition as two.
"""

import argparse
import collections
import datetime
import functools
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

SECONDS = 12  # that a contender is measured in each of its turns
WARM_UP = 3  # steps that are not counted


def rate(step: Callable[[], Any], amount: float) -> float:
    """Return amount per second of a function that is called again and again."""
    for _ in range(WARM_UP):
        step()
    begin, calls = time.perf_counter(), 0
    while time.perf_counter() - begin < SECONDS:
        step()
        calls += 1
    return amount * calls / (time.perf_counter() - begin)


def flops(model: Any) -> int:
    """Count the floating-point operations of a training step, per image."""
    total = 0
    for layer in model.layers:
        if hasattr(layer, "kernel"):
            positions = np.prod(layer.output.shape[1:-1], dtype=int)  # 1 if dense
            total += 3 * 2 * positions * np.prod(layer.kernel.shape)
    return int(total)


def dropout() -> float:
    """Return the dropout of 15 epochs of FER2013."""
    import train

    return train.regularize(15 * 28_273)["dropout"]


def default_model() -> tuple[Any, argparse.Namespace]:
    """Build the network that python train.py trains in a long run."""
    import train

    args = train.parse_args(["--epochs", "15"])
    args.precision = train.choose_precision()
    return train.make_model(args, steps=10_000, dropout=dropout()), args


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

    images = args.batch_size * model.steps_per_execution
    return {"images/s": rate(step, images), "flops": flops(model)}


def epoch_rate(model: Any, batches: Any, batch_size: int, **options: Any) -> float:
    """Return the images a second of an epoch of fit, without its beginning and end."""
    import keras

    times: list[tuple[int, float]] = []

    def note(batch: int, logs: dict) -> None:
        times.append((batch, time.perf_counter()))

    options["callbacks"] = [
        *options.get("callbacks", []),
        keras.callbacks.LambdaCallback(on_train_batch_end=note),
    ]
    model.fit(batches, epochs=1, verbose=0, **options)
    (first, begin), (last, end) = times[WARM_UP], times[-1]
    return (last - first) * batch_size / (end - begin)


def pipeline() -> dict[str, Any]:
    """Train the default network from files, as train.py does."""
    import train  # before Keras: it sets TensorFlow up

    keras = train.keras
    index, _ = train.utils.index_folder(ROOT / "data" / "train", train.CLASS_NAMES)
    index = index.sample(min(len(index), 12_800), random_state=1)  # 100 whole batches
    model, args = default_model()
    batches, _ = train.make_generators(index, index, args)
    speed = epoch_rate(
        model,
        batches,
        batches.batch_size,
        shuffle=False,
        callbacks=[
            keras.callbacks.SwapEMAWeights(),
            batches.follow_epochs(),
            keras.callbacks.TerminateOnNaN(),
        ],
    )
    return {"images/s": speed, "flops": flops(model)}


def tutorial() -> dict[str, Any]:
    """Train what tutorials of this field write, with every default left as it is.

    TensorFlow's own choice whether to use oneDNN is one of them.
    """
    import keras
    from tensorflow.keras.preprocessing.image import ImageDataGenerator

    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((48, 48, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(128, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(6, activation="softmax"),
        ]
    )
    model.compile("adam", "categorical_crossentropy", metrics=["accuracy"])
    generator = ImageDataGenerator(rescale=1 / 255, horizontal_flip=True)
    batches = generator.flow_from_directory(
        ROOT / "data" / "train", target_size=(48, 48), color_mode="grayscale"
    )
    return {
        "images/s": epoch_rate(model, batches, batches.batch_size, steps_per_epoch=400),
        "flops": flops(model),
    }


def torch_in_memory() -> dict[str, Any]:
    """Train the default network in PyTorch on one batch, over and over."""
    import torch
    from torch import nn

    import train

    args = train.parse_args([])
    bfloat16 = train.choose_precision() == "mixed_bfloat16"
    half = (args.filters[0] + 1) // 2
    channels = [half, *args.filters]
    stem = [
        nn.Conv2d(1, half, 3, padding=1, bias=False),
        nn.BatchNorm2d(half),
        nn.SiLU(),
    ]
    blocks = [
        nn.Sequential(
            nn.Conv2d(before, width, 3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.SiLU(),
        )
        for before, width in itertools.pairwise(channels)
    ]
    side = train.IMAGE_SIZE >> len(blocks)
    model = nn.Sequential(
        *stem,
        *blocks,
        nn.Flatten(),
        nn.Dropout(dropout()),
        nn.Linear(channels[-1] * side * side, args.dense_units, bias=False),
        nn.BatchNorm1d(args.dense_units),
        nn.SiLU(),
        nn.Dropout(dropout()),
        nn.Linear(args.dense_units, 6),
    ).to(memory_format=torch.channels_last)
    *kernels, _ = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if all(p is not k for k in kernels)]
    optimizer = torch.optim.AdamW(rest, train.LEARNING_RATE)
    momentums = [torch.zeros_like(kernel) for kernel in kernels]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
    )
    loss = nn.CrossEntropyLoss(label_smoothing=train.LABEL_SMOOTHING)
    faces = torch.rand(args.batch_size, 1, 48, 48)
    faces = faces.to(memory_format=torch.channels_last)
    labels = torch.randint(0, 6, (args.batch_size,))

    def step() -> None:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss(model(faces), labels)
        value.backward()
        optimizer.step()
        with torch.no_grad():
            for kernel, momentum in zip(kernels, momentums, strict=True):
                momentum.lerp_(kernel.grad, 0.05)
                matrix = kernel.grad.lerp(momentum, 0.95).flatten(1)
                change = torch_orthogonal(matrix.bfloat16() if bfloat16 else matrix)
                change = change.float().view_as(kernel) * max(matrix.shape) ** 0.5
                kernel.mul_(1 - train.LEARNING_RATE * train.WEIGHT_DECAY)
                kernel.sub_(change, alpha=0.2 * train.LEARNING_RATE)
        average.update_parameters(model)

    return {"images/s": rate(step, args.batch_size)}


def torch_orthogonal(matrix: Any) -> Any:
    """Return the orthogonal matrix next to one, as Muon does."""
    tall = matrix.shape[0] > matrix.shape[1]
    matrix = matrix.T if tall else matrix
    matrix = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = matrix @ matrix.T
        matrix = 3.4445 * matrix + (2.0315 * square @ square - 4.775 * square) @ matrix
    return matrix.T if tall else matrix


def matrix_product(dtype: str) -> dict[str, Any]:
    """Multiply two large matrices: the most that the machine gives."""
    from utils import starting_tensorflow

    with starting_tensorflow():
        import tensorflow as tf

    size = 4096
    matrix = tf.cast(tf.random.normal((size, size)), dtype)
    product = tf.function(lambda: tf.reduce_max(matrix @ matrix))
    return {"GFLOP/s": rate(lambda: float(product()), 2 * size**3 / 1e9)}


def crops() -> dict[str, Any]:
    """Predict the face crops of data/test from files, as predict.py does."""
    import utils

    model, _ = utils.load_model(ROOT / utils.MODEL_PATH)
    paths = list(utils.list_files(ROOT / "data" / "test"))
    read = functools.partial(read_faces, faces="never")
    seconds = predict_all(model, paths, read)
    forward = flops(model) / 3 * 2 * len(utils.SCALES)
    return {"images/s": len(paths) / seconds, "flops": forward}


def photos() -> dict[str, Any]:
    """Predict the portrait of data/, twenty times, at 1024 pixels a side."""
    from PIL import Image

    import utils

    model, _ = utils.load_model(ROOT / utils.MODEL_PATH)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/portrait.jpg"
        with Image.open(ROOT / "data" / "astronaut.jpg") as image:
            image.resize((1024, 1024)).save(path)
        read = functools.partial(read_faces, faces="always")
        return {"images/s": 20 / predict_all(model, [path] * 20, read)}


def read_faces(path: str, faces: str) -> list:
    """Read faces as predict.py does."""
    import predict

    return predict.read_faces(path, faces)


def predict_all(model: Any, paths: list[str], read: Callable) -> float:
    """Return the seconds that predicting files takes, once it has been done before."""
    import utils

    list(utils.predict_files(model, paths[:130], read))
    begin = time.perf_counter()
    list(utils.predict_files(model, paths, read))
    return time.perf_counter() - begin


CONTENDERS = {
    "one large matrix product, float32": lambda: matrix_product("float32"),
    "one large matrix product, bfloat16": lambda: matrix_product("bfloat16"),
    "default network, batch in memory": in_memory,
    "default network, train.py's pipeline": pipeline,
    "tutorial network, all defaults": tutorial,
    "default network in PyTorch, batch in memory": torch_in_memory,
}
PREDICTION = {
    "one large matrix product, float32": lambda: matrix_product("float32"),
    "crops of data/test, six views each": crops,
    "photos of 1024 x 1024 pixels, faces searched": photos,
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


def measure(name: str) -> dict[str, Any]:
    """Measure a contender, and the peak memory of this process in MB."""
    figures = (CONTENDERS | PREDICTION)[name]()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return figures | {"memory": memory}


def speed(turns: int) -> None:
    """Print the medians of all contenders."""
    names = list(CONTENDERS)
    try:
        import torch
    except ImportError:
        names.pop()
    print(f"{describe_machine()}; medians of {turns} turns\n")
    measured = collections.defaultdict(list)
    for _ in range(turns):
        for name in names:
            measured[name].append(in_process(f"benchmark.measure({name!r})"))
    medians = {}
    operations = measured["default network, batch in memory"][0]["flops"]
    print(f"{'':44} images/s  GFLOP/s  peak memory")
    for name, runs in measured.items():
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        if "images/s" in median:
            flops = median.get("flops", operations)
            median["GFLOP/s"] = median["images/s"] * flops / 1e9
        medians[name] = median
        images = f"{median['images/s']:8.0f}" if "images/s" in median else " " * 8
        print(f"{name:44} {images} {median['GFLOP/s']:8.0f} {median['memory']:9.0f} MB")
    _, _, memory, pipeline, tutorial, *rest = medians.values()
    print()
    print(
        f"pipeline / memory, images/s: {pipeline['images/s'] / memory['images/s']:.3f}"
    )
    ratio = pipeline["GFLOP/s"] / tutorial["GFLOP/s"]
    print(f"pipeline / tutorial, GFLOP/s: {ratio:.2f}")
    for other in rest:
        ratio = memory["images/s"] / other["images/s"]
        print(f"memory / PyTorch {torch.__version__}, images/s: {ratio:.2f}")


def start(command: list[str]) -> float:
    """Return the seconds of a whole process."""
    begin = time.perf_counter()
    subprocess.run(
        [sys.executable, *command], cwd=ROOT, check=True, capture_output=True
    )
    return time.perf_counter() - begin


def prediction(turns: int) -> None:
    """Print how long predictions take."""
    print(f"{describe_machine()}; medians of {turns} turns\n")
    commands = {
        'python -c "import tensorflow"': ["-c", "import tensorflow"],
        "python predict.py --image <crop>": [
            "predict.py",
            "--image",
            "data/demo/test/happy/03.png",
        ],
    }
    seconds, measured = collections.defaultdict(list), collections.defaultdict(list)
    for _ in range(turns):
        for name, command in commands.items():
            seconds[name].append(start(command))
        for name in PREDICTION:
            measured[name].append(in_process(f"benchmark.measure({name!r})"))
    medians = [statistics.median(values) for values in seconds.values()]
    for name, value in zip(seconds, medians, strict=True):
        print(f"{name:44} {value:6.2f} s")
    print(f"\npredict / import, s: {medians[1] / medians[0]:.2f}\n")
    print(f"{'':44} images/s  GFLOP/s  peak memory")
    limit, files, photos = (
        {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for runs in measured.values()
    )
    files["GFLOP/s"] = files["images/s"] * files["flops"] / 1e9
    for name, median in zip(measured, (limit, files, photos), strict=True):
        values = [
            f"{median[key]:8.1f}" if key in median else " " * 8
            for key in ("images/s", "GFLOP/s")
        ]
        print(f"{name:44} {' '.join(values)} {median['memory']:9.0f} MB")
    ratio = files["GFLOP/s"] / limit["GFLOP/s"]
    print(f"\ncrops / matrix product, GFLOP/s: {ratio:.3f}")


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


def index_and_train(folder: str) -> dict[str, float]:
    """Index a tree, then train the smallest network on it for an epoch, as users do."""
    import train

    names = [f"emotion {emotion}" for emotion in range(6)]
    begin = time.perf_counter()
    index, _ = train.utils.index_folder(Path(folder) / "train", names)
    seconds = time.perf_counter() - begin
    table = index.memory_usage(deep=True).sum() / 1e6
    begin = time.perf_counter()
    np.random.default_rng(1).shuffle(np.arange(len(index)))
    shuffle = time.perf_counter() - begin
    del index
    words = [
        "--data-dir",
        folder,
        "--model-path",
        f"{folder}/model.h5",
        "--epochs",
        "1",
    ]
    words += ["--filters", "1", "--dense-units", "1", "--classes", *names]
    sys.stdout.flush()
    begin = time.perf_counter()
    train.main(words)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "index, s": seconds,
        "index, MB": table,
        "shuffle, s": shuffle,
        "index + epoch, s": time.perf_counter() - begin,
        "peak memory, MB": memory,
    }


def memory() -> None:
    """Print what time and memory grow by from 3,000 to 300,000 images."""
    print(f"{describe_machine()}\n")
    peaks = []
    for images in (3_000, 300_000):
        with tempfile.TemporaryDirectory() as folder:
            draw_tree(Path(folder), images)
            figures = in_process(f"benchmark.index_and_train({folder!r})")
        peaks.append(figures["peak memory, MB"])
        values = ", ".join(f"{name} {value:.3g}" for name, value in figures.items())
        print(f"{images} images: {values}", flush=True)
    print(f"\npeak memory grows by {peaks[1] - peaks[0]:.0f} MB")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("what", choices=["speed", "memory", "predict"])
    parser.add_argument("--turns", type=int, default=3, help="times each is measured")
    args = parser.parse_args()
    if args.what == "memory":
        memory()
    elif args.what == "predict":
        prediction(args.turns)
    else:
        speed(args.turns)


if __name__ == "__main__":
    main()
