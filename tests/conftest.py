"""A small tree of images, a model trained once, and the two commands as processes."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import predict
import train
import utils
from train import keras  # train.py's: it sets TensorFlow up

ROOT = Path(__file__).parent.parent
MODEL = "models/face_classification_model.h5"
DEMO = "python train.py --data-dir data/demo --epochs 15 --model-path models/demo.h5"
CLASSES = ["angry", "happy", "sad"]
SMALL = [*"--filters 4 8 --dense-units 5 --classes".split(), *CLASSES]
UNIX = pytest.mark.skipif(
    os.name == "nt", reason="of Unix: limits, pipes, links, signals, shells"
)
LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="of Linux: /proc, /dev/full, names of any bytes"
)
CROP = ROOT / "data" / "demo" / "test" / "happy" / "03.png"
PORTRAIT = ROOT / "data" / "astronaut.jpg"
EMOTIONS = ["angry", "fear", "happy", "neutral", "sad", "surprise"]
# Small networks take longer to become graphs than to train. The processes of
# test_demo.py and test_stop.py train as users do.
train.tf.config.run_functions_eagerly(True)
Ask = Callable[..., tuple[int | str | None, str, str]]  # as of the fixture ask
FakeSearch = SimpleNamespace  # of the fixture search: boxes to find, sizes of images


def random_pixels(seed: int, size: int = 48) -> np.ndarray:
    """Return gray noise, uint8 of shape (size, size)."""
    return np.random.default_rng(seed).integers(0, 256, (size, size), np.uint8)


def make_tree(folder: Path, classes: list[str], train: int = 12, test: int = 4) -> Path:
    """Write folder/{train,test}/<class>/*.png, every image different."""
    seed = 0
    for part, count in (("train", train), ("test", test)):
        for name in classes:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                image = Image.fromarray(random_pixels(seed))
                image.save(folder / part / name / f"{number:02}.png")
                seed += 1
    return folder


def small_model() -> keras.Sequential:
    """Build the network of the options SMALL."""
    return train.build_model((48, 48, 1), 3, filters=[4, 8], dense_units=5)


def randomize(model: keras.Model) -> None:
    """Give a network random weights, the same each time."""
    random = np.random.default_rng(1)
    for weight in model.weights:
        values = random.normal(size=weight.shape) / np.prod(weight.shape[:-1]) ** 0.5
        weight.assign(np.abs(values) if "variance" in weight.name else values)


def save_model(model: keras.Model, path: Path) -> Path:
    """Write a model file as train.py does, whatever the network is made of."""
    train.save_model(model, path, {"class_names": CLASSES, "rescale": utils.RESCALE})
    return path


def assert_same_arrays(first: list, second: list) -> None:
    """Compare arrays bit for bit."""
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def run_train(tree: Path, model_path: Path, *options: object) -> None:
    """Train a small network on a tree, in this process."""
    words = [*SMALL, "--data-dir", tree, "--model-path", model_path, *options]
    train.main(list(map(str, words)))


@contextlib.contextmanager
def file_size_limit(limit: int) -> Generator[None, None, None]:
    """Let no file grow beyond a number of bytes, as if the disk were full."""
    import resource  # which Windows has not

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with train/ and test/ of three classes."""
    return make_tree(tmp_path / "faces", CLASSES)


@pytest.fixture(scope="module")
def empty_figures() -> Generator[None, None, None]:
    """Write figures as empty files, where a test looks at other things: quicker."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())
        yield


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of what the commands need, so that they write nothing here."""
    folder = tmp_path_factory.mktemp("project") / "checkout"
    shutil.copytree(ROOT / "data" / "demo", folder / "data" / "demo")
    (folder / "models").mkdir()
    data = ["data/astronaut.jpg", "data/astronaut.mp4"]
    for name in (*data, "train.py", "predict.py", "utils.py", MODEL):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def run(checkout: Path) -> Callable[..., subprocess.CompletedProcess]:
    """Return a function that runs a command in the checkout, as a user would."""

    def run(*command: str | Path) -> subprocess.CompletedProcess:
        words = [sys.executable, *map(str, command)]
        # A user's choice of windows for plots must not matter.
        options = {"env": os.environ | {"MPLBACKEND": "module://of_windows"}}
        options |= {"cwd": checkout, "capture_output": True, "text": True}
        return subprocess.run(words, **options)

    return run


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch) -> FakeSearch:
    """Let predict.py find faces at search.boxes: left, top, width, height."""
    fake = FakeSearch(boxes=[], sizes=[])

    def find(image: Image.Image, size: int, border: float = 0) -> tuple:
        fake.sizes.append(image.size)
        boxes = np.reshape(fake.boxes, (-1, 4)).astype(float)
        boxes[:, 2:] += boxes[:, :2]
        return boxes, np.ones(len(boxes))

    monkeypatch.setattr(predict, "search", find)
    return fake


def noise(path: Path, width: int, height: int) -> Path:
    """Write a picture of noise."""
    pixels = np.random.default_rng(3).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def ask(capsys: pytest.CaptureFixture) -> Ask:
    """Return a function that runs predict.py here, with the model that ships.

    It returns the exit code, or the line that makes it 1, and stdout and stderr.
    """

    def ask(*words: object) -> tuple[int | str | None, str, str]:
        try:
            code = predict.main(["--model", str(ROOT / MODEL), *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return ask
