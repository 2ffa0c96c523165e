"""A model file that a tutorial's model.save made is taken, with the right answers.

The reference is Keras on TensorFlow, which loads the same network.
"""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import random_pixels, randomize
from PIL import Image

import predict
import utils
from utils import UserError

layers = keras.layers
EMOTIONS = ["angry", "fear", "happy"]
UNIT = "taken for a network of gray pixels of 0 to 1"
RAW = "taken for a network of gray pixels of 0 to 255, which it scales itself"


def chain(size: int = 48, *begin: keras.Layer, end: str = "softmax") -> keras.Model:
    """Build the kind of network that tutorials have."""
    return keras.Sequential(
        [
            keras.Input((size, size, 1)),
            *begin,
            layers.Conv2D(4, 3),
            layers.BatchNormalization(),
            layers.LeakyReLU(0.1),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(3, padding="same", activation="elu"),
            layers.SeparableConv2D(5, 3, activation="elu"),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(3, activation=end),
        ]
    )


def branches() -> keras.Model:
    """Build a network that is no chain."""
    begin = keras.Input((48, 48, 1))
    one = layers.Conv2D(4, 3, padding="same")(begin)
    two = layers.Conv2D(4, 5, padding="same")(one)
    both = layers.Concatenate()([layers.Add()([one, two]), two])
    end = layers.Dense(3, activation="softmax")(layers.GlobalMaxPooling2D()(both))
    return keras.Model(begin, end)


def borrowed() -> keras.Model:
    """Build a network of another one's layers, whose arrays keep their paths."""
    other = chain()
    return keras.Model(other.inputs, layers.Dense(3)(other.layers[-2].output))


def save(model: keras.Model, path: Path) -> Path:
    """Give a network random weights, and save it as a tutorial does."""
    randomize(model)
    model.compile("adam", "categorical_crossentropy")
    model.save(path)
    return path


def take_arrays(group: h5py.Group) -> dict[str, np.ndarray]:
    """Take all arrays out of a group, by their names."""
    names: list[str] = []
    group.visit(names.append)
    datasets = [name for name in names if isinstance(group[name], h5py.Dataset)]
    arrays = {name: group[name][...] for name in datasets}
    for name in arrays:
        del group[name]
    return arrays


def as_keras_2(path: Path, oldest: bool = False) -> None:
    """Write the file anew as Keras 2 does; or as its oldest versions, a chain."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        chain, outer = config["class_name"] == "Sequential", config["config"]
        for layer in outer["layers"]:
            settings = layer["config"]
            if shape := settings.pop("batch_shape", None):
                settings["batch_input_shape"] = shape
            if layer["class_name"] == "LeakyReLU":
                settings["alpha"] = settings.pop("negative_slope")
            if layer["class_name"] in ("DepthwiseConv2D", "SeparableConv2D"):
                settings["groups"] = 1
            if oldest and layer["class_name"] == "Conv2D":
                del settings["groups"]
            for node in layer.get("inbound_nodes", []):
                [tensors] = node["args"]
                tensors = tensors if isinstance(tensors, list) else [tensors]
                names = [tensor["config"]["keras_history"][0] for tensor in tensors]
                layer["inbound_nodes"] = [[[name, 0, 0, {}] for name in names]]
        if not chain:
            config["class_name"] = "Model"
        elif oldest:
            first, second, *rest = outer["layers"]
            shape = first["config"]["batch_input_shape"]
            second["config"]["batch_input_shape"] = shape
            config["config"] = [second, *rest]
        file.attrs["model_config"] = json.dumps(config)
        group = file["model_weights"]
        for name, values in take_arrays(group).items():
            owner, *_, array = name.split("/")
            is_depthwise = owner.startswith("depthwise_conv") and array == "kernel"
            array = "depthwise_kernel" if is_depthwise else array
            group[f"{owner}/{owner}/{array}:0"] = values
            attributes, path = group[owner].attrs, f"{owner}/{array}:0"
            old = [name for name in attributes["weight_names"] if name.endswith(":0")]
            attributes["weight_names"] = [*old, path]


def compress(path: Path) -> None:
    """Write the arrays in pieces, compressed."""
    with h5py.File(path, "r+") as file:
        group, options = file["model_weights"], {"compression": "gzip", "shuffle": True}
        for name, values in take_arrays(group).items():
            group.create_dataset(name, data=values, **options)


NETWORKS: dict[str, tuple[Callable[[], keras.Model], Callable | None, str]] = {
    "Keras 3": (chain, None, UNIT),
    "Keras 3, branches": (branches, None, UNIT),
    "Keras 2": (chain, as_keras_2, UNIT),
    "Keras 2, branches": (branches, as_keras_2, UNIT),
    "Keras 2, early": (chain, functools.partial(as_keras_2, oldest=True), UNIT),
    "compressed": (chain, compress, UNIT),
    "64 pixels": (lambda: chain(64), None, UNIT),
    "raw": (lambda: chain(48, layers.Rescaling(1 / 255)), None, RAW),
    "logits": (lambda: chain(end="linear"), None, f"{UNIT}, and of logits"),
    "other logits": (lambda: chain(end="relu"), None, f"{UNIT}, and of logits"),
    "a layer after softmax": (
        lambda: keras.Sequential(
            [keras.Input((48, 48, 1)), *chain().layers, layers.Dropout(0.5)]
        ),
        None,
        UNIT,
    ),
    "another's layers": (borrowed, None, f"{UNIT}, and of logits"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_foreign_models_predict_as_in_keras(name: str, tmp_path: Path) -> None:
    make, rewrite, assumed = NETWORKS[name]
    model = make()
    path = save(model, tmp_path / "model.h5")
    if rewrite:
        rewrite(path)
    network = utils.load_model(path, EMOTIONS)
    assert (network.assumed, network.class_names) == (assumed, EMOTIONS)
    assert network.size == model.input_shape[1]
    shape = 5, network.size, network.size, 1
    faces = np.random.default_rng(2).random(shape, np.float32)
    expected = model.predict_on_batch(faces * 255 if name == "raw" else faces)
    if "logits" in assumed:
        expected = keras.ops.softmax(expected)
    assert np.std(expected, axis=0).max() > 1e-4  # faces differ in their answers
    np.testing.assert_allclose(network.predict(faces, False), expected, atol=1e-5)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model file of a network that takes 64 x 64 pixels."""
    return save(chain(64), tmp_path_factory.mktemp("foreign") / "model.h5")


def test_faces_are_scaled_to_the_input(path: Path, tmp_path: Path) -> None:
    photo = random_pixels(1, 64)
    Image.fromarray(photo).save(tmp_path / "face.png")
    network = utils.load_model(path, EMOTIONS)
    [expected] = network.predict(utils.to_input(photo[np.newaxis]))
    [record] = predict.find_emotions(tmp_path / "face.png", network)
    told = list(record["probabilities"].values())
    np.testing.assert_allclose(told, expected, atol=6e-5)


def test_the_command(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    face = tmp_path / "train" / "fear" / "face.png"
    face.parent.mkdir(parents=True)
    Image.fromarray(random_pixels(1, 64)).save(face)
    words = ["--model", str(path), "--classes", *EMOTIONS]
    heat = tmp_path / "heat.png"
    assert predict.main(["--image", str(face), "--explain", str(heat), *words]) == 0
    printed = capsys.readouterr()
    assert printed.err == f"predict.py: {path}: {UNIT}\n"
    assert heat.exists()
    answer = printed.out.partition(" ")[0].lower()
    assert predict.main(["--evaluate", str(face.parent.parent), *words]) == 0
    right = "100.0" if answer == "fear" else "0.0"
    assert f"Test accuracy {right} % ± 0.0 % (1 images, all" in capsys.readouterr().out


def test_missing_and_superfluous_class_names(path: Path, tmp_path: Path) -> None:
    line = "give predict.py --classes, in the order of its outputs"
    with pytest.raises(UserError) as error:
        utils.load_model(path)
    assert str(error.value) == f"{path}: holds no class names; {line}"
    with pytest.raises(UserError, match="it has 3 outputs for 2 classes"):
        utils.load_model(path, EMOTIONS[:2])
    own = utils.ROOT / utils.MODEL_PATH
    with pytest.raises(UserError) as error:
        utils.load_model(own, EMOTIONS)
    assert str(error.value) == f"{own}: names its classes; omit --classes"


def test_bad_class_names_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        predict.main(["--image", "face.png", "--classes", "angry", "angry"])
    assert stop.value.code == 2
    assert "--classes needs two or more different names" in capsys.readouterr().err
