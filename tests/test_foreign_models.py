"""A model file that a tutorial's model.save made is taken, with the right answers.

The reference is Keras on TensorFlow, which made the file.
"""

import json
import re
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import CLASSES, CROP, MODEL, Ask, random_pixels, randomize
from PIL import Image

import utils

layers = keras.layers
UNIT = "taken for a network of gray pixels of 0 to 1"
RAW = "taken for a network of gray pixels of 0 to 255, which it scales itself"


def chain(size: int, *begin: keras.Layer, end: str = "softmax") -> keras.Model:
    """Build the kind of network that tutorials have."""
    middle = [layers.Conv2D(4, 3), layers.LeakyReLU(0.1), layers.SeparableConv2D(4, 3)]
    answer = layers.Dense(3, activation=end)
    first = keras.Input((size, size, 1))
    return keras.Sequential([first, *begin, *middle, layers.Flatten(), answer])


def branches() -> keras.Model:
    """Build a network that is no chain, and ends in a layer for training only."""
    faces = keras.Input((48, 48, 1))
    x = layers.Concatenate()([faces, layers.Conv2D(4, 3, padding="same")(faces)])
    answer = layers.Dense(3, activation="softmax")(layers.Flatten()(x))
    return keras.Model(faces, layers.Dropout(0.5)(answer))


def make_old(path: Path) -> None:
    """Turn a model file into one of Keras 2; a chain into one of its first version."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        begin, *rest = config["config"]["layers"]
        shape = begin["config"].pop("batch_shape")
        if config["class_name"] == "Sequential":
            rest[0]["config"]["batch_input_shape"] = shape
            config["config"] = rest
        else:
            begin["config"]["batch_input_shape"] = shape
            config["class_name"] = "Model"
        for layer in rest:
            settings = layer["config"]
            if layer["class_name"] == "LeakyReLU":
                settings["alpha"] = settings.pop("negative_slope")
            elif layer["class_name"] == "SeparableConv2D":
                settings["groups"] = 1
            elif layer["class_name"] == "Conv2D":
                del settings["groups"]
            if nodes := layer.get("inbound_nodes"):
                names = re.findall(r'"keras_history": \["(\w+)"', json.dumps(nodes))
                layer["inbound_nodes"] = [[[name, 0, 0, {}] for name in names]]
            group = file["model_weights"][settings["name"]]
            paths = list(group.attrs["weight_names"])
            for place in paths:
                group.move(place, f"{place}:0")
            group.attrs["weight_names"] = [f"{place}:0" for place in paths]
        file.attrs["model_config"] = json.dumps(config)


@pytest.mark.parametrize(
    ("model", "is_old", "assumed"),
    [
        (chain(48), True, UNIT),
        (branches(), True, UNIT),
        (chain(64, layers.Rescaling(1 / 255)), False, RAW),
        (chain(48, end="linear"), False, f"{UNIT}, and of logits"),
    ],
    ids=["Keras 2", "Keras 2, branches", "raw", "logits"],
)
def test_answers_are_those_of_keras(
    model: keras.Model, is_old: bool, assumed: str, tmp_path: Path
) -> None:
    randomize(model)
    model.save(tmp_path / "model.h5")
    if is_old:
        make_old(tmp_path / "model.h5")
    network = utils.load_model(tmp_path / "model.h5", CLASSES)
    assert (network.assumed, network.size) == (assumed, model.input_shape[1])
    shape = 5, network.size, network.size, 1
    faces = np.random.default_rng(2).random(shape, np.float32)
    expected = model.predict_on_batch(faces * 255 if assumed == RAW else faces)
    if "logits" in assumed:
        expected = keras.ops.softmax(expected)
    assert np.std(expected, axis=0).max() > 1e-4  # faces differ in their answers
    np.testing.assert_allclose(network.predict(faces, False), expected, atol=1e-5)


def test_the_command_names_what_it_assumes(tmp_path: Path, ask: Ask) -> None:
    path, heat = tmp_path / "model.h5", tmp_path / "heat.png"
    chain(64).save(path)
    face = tmp_path / "test" / "happy" / "face.png"
    face.parent.mkdir(parents=True)
    pixels = random_pixels(1, 64)
    Image.fromarray(pixels).save(face)
    network = utils.load_model(path, CLASSES)
    [expected] = network.predict(utils.to_input(pixels[np.newaxis]))
    words = ["--model", path, "--classes", *CLASSES]
    code, out, err = ask("--image", face, "--format", "json", "--explain", heat, *words)
    assert (code, err) == (0, f"predict.py: {path}: {UNIT}\n")
    assert heat.exists()
    rounded = pytest.approx(dict(zip(CLASSES, expected, strict=True)), abs=6e-5)
    assert json.loads(out)["probabilities"] == rounded
    code, out, _ = ask("--evaluate", tmp_path / "test", *words)
    right = "100.0" if expected.argmax() == CLASSES.index("happy") else "0.0"
    assert code == 0 and f"Test accuracy {right} % ± 0.0 % (1 images, all" in out


def test_classes_are_named_exactly_once(tmp_path: Path, ask: Ask) -> None:
    chain(48).save(tmp_path / "model.h5")
    words = ["--image", CROP, "--model", tmp_path / "model.h5"]
    hint = "give predict.py --classes, in the order of its outputs"
    assert ask(*words)[0].endswith(f"{words[-1]}: holds no class names; {hint}")
    told = ask("--image", CROP, "--classes", *CLASSES)[0]
    assert told.endswith(f"{MODEL}: names its classes; omit --classes")
    code, _, err = ask(*words, "--classes", "happy", "happy")
    assert code == 2 and "--classes needs two or more different names" in err
