"""OpenVINO computes what Keras computes, for every kind of layer that is allowed.

The reference is Keras on TensorFlow, which loads the same file.
"""

import json
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import ROOT, assert_same_arrays, randomize, save_model, small_model

import utils
from utils import UserError

layers = keras.layers
ACTIVATIONS = [name for name in utils.ACTIVATIONS if name != "softmax"]
TRAINING_ONLY = (
    "Dropout SpatialDropout2D AlphaDropout GaussianDropout GaussianNoise "
    "ActivityRegularization RandomRotation RandomZoom RandomContrast"
).split()
RANDOM = np.random.default_rng(1)


def assert_same(model: keras.Model, path: Path) -> None:
    """Compare what the engine and Keras say about random faces."""
    randomize(model)
    network = utils.load_model(save_model(model, path))
    faces = RANDOM.random((5, 48, 48, 1), np.float32)
    loaded = keras.saving.load_model(path, compile=False)
    expected = loaded.predict_on_batch(faces)
    assert expected.std(axis=0).max() > 1e-4  # faces differ in their answers
    np.testing.assert_allclose(network.predict(faces, tta=False), expected, atol=1e-5)
    assert_same_arrays(network.weights, loaded.get_weights())


def conv(*arguments: object, **options: object) -> keras.Layer:
    """Make a convolution that keeps the size unless it is told otherwise."""
    return layers.Conv2D(*arguments, **{"padding": "same"} | options)


IMAGES = {  # layers that take 12 x 12 pixels of 6 channels
    "conv same": conv(4, 3),
    "conv strides": conv(4, (3, 2), strides=(2, 2)),
    "conv valid": conv(5, (2, 4), padding="valid", strides=(1, 3)),
    "conv dilation": conv(4, 3, dilation_rate=(2, 3), use_bias=False),
    "conv groups": conv(9, 3, groups=3, strides=2, activation="relu"),
    "depthwise": layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2),
    "depthwise same": layers.DepthwiseConv2D(
        (3, 2), padding="same", dilation_rate=2, activation="tanh", use_bias=False
    ),
    "separable": layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=3),
    "separable same": layers.SeparableConv2D(
        5, (2, 3), padding="same", activation="elu", use_bias=False
    ),
    "max pooling": layers.MaxPooling2D(),
    "max pooling same": layers.MaxPooling2D((3, 2), strides=(2, 5), padding="same"),
    "average pooling": layers.AveragePooling2D((3, 2), strides=2),
    "average pooling same": layers.AveragePooling2D(5, strides=3, padding="same"),
    "global average": layers.GlobalAveragePooling2D(),
    "global average keepdims": layers.GlobalAveragePooling2D(keepdims=True),
    "global max": layers.GlobalMaxPooling2D(),
    "global max keepdims": layers.GlobalMaxPooling2D(keepdims=True),
    "batch normalization": layers.BatchNormalization(epsilon=0.1),
    "batch normalization plain": layers.BatchNormalization(scale=False, center=False),
    "layer normalization": layers.LayerNormalization(epsilon=0.01),
    "layer normalization plain": layers.LayerNormalization(scale=False, center=False),
    "group normalization": layers.GroupNormalization(3, epsilon=0.01),
    "instance normalization": layers.GroupNormalization(-1, scale=False),
    "softmax": layers.Softmax(),
    "activation softmax": layers.Activation("softmax"),
    "relu": layers.ReLU(max_value=0.5, negative_slope=0.1),
    "relu plain": layers.ReLU(),
    "leaky relu": layers.LeakyReLU(0.3),
    "prelu": layers.PReLU(),
    "prelu shared": layers.PReLU(shared_axes=[1, 2]),
    "elu": layers.ELU(0.7),
    "dense of images": layers.Dense(4, activation="gelu"),
    "flatten": layers.Flatten(),
    "reshape to images": layers.Reshape((9, -1, 6)),
    "reshape to rows": layers.Reshape((24, 36)),
    "zero padding": layers.ZeroPadding2D(((1, 2), (3, 0))),
    "zero padding of one number": layers.ZeroPadding2D(2),
    "rescaling": layers.Rescaling(2.5, offset=-1),
    "flip": layers.RandomFlip("horizontal"),
    "grayscale": layers.RandomGrayscale(0.5),
    "translation": layers.RandomTranslation(0.2, 0.2),
}
IMAGES |= {name: layers.Activation(name) for name in ACTIVATIONS}
IMAGES |= {name: getattr(layers, name)(0.5) for name in TRAINING_ONLY}
ROWS = {  # layers that take 20 numbers
    "dense": layers.Dense(7, use_bias=False, activation="softplus"),
    "batch normalization": layers.BatchNormalization(),
    "layer normalization": layers.LayerNormalization(),
    "softmax": layers.Softmax(),
    "prelu": layers.PReLU(),
    "reshape": layers.Reshape((2, 5, 2)),
}


@pytest.mark.parametrize("layer", IMAGES.values(), ids=IMAGES)
def test_layers_of_images(layer: keras.Layer, tmp_path: Path) -> None:
    begin = [keras.Input((48, 48, 1)), layers.Conv2D(6, 4, strides=4)]
    end = [layers.Flatten(), layers.Dense(3, activation="softmax")]
    assert_same(keras.Sequential([*begin, layer, *end]), tmp_path / "model.h5")


@pytest.mark.parametrize("layer", ROWS.values(), ids=ROWS)
def test_layers_of_rows(layer: keras.Layer, tmp_path: Path) -> None:
    begin = [keras.Input((48, 48, 1)), layers.AveragePooling2D(8), layers.Flatten()]
    begin += [layers.Dense(20), layer]
    end = [layers.Flatten(), layers.Dense(3, activation="softmax")]
    assert_same(keras.Sequential([*begin, *end]), tmp_path / "model.h5")


def test_branches(tmp_path: Path) -> None:
    faces = keras.Input((48, 48, 1))
    x = conv(6, 4, strides=4, activation="silu")(faces)
    x = layers.Add()([x, conv(6, 3)(x)])  # a residual block
    squeezed = layers.Dense(2, activation="relu")(layers.GlobalAveragePooling2D()(x))
    excited = layers.Dense(6, activation="sigmoid")(squeezed)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 6))(excited)])
    x = layers.Concatenate()([x, layers.Dropout(0.1)(x), conv(2, 1)(x)])
    x = layers.Concatenate()([layers.Flatten()(x), squeezed])
    answer = layers.Dense(3, activation="softmax")(x)
    assert_same(keras.Model(faces, answer), tmp_path / "model.h5")


def test_the_network_of_the_recipe(tmp_path: Path) -> None:
    assert_same(small_model(), tmp_path / "model.h5")


def doubled(times: int) -> keras.Model:
    """Build a network that concatenates what it has with itself, again and again."""
    faces = x = keras.Input((48, 48, 1))
    for _ in range(times):
        x = layers.Concatenate()([x, x])
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(faces, layers.Dense(3)(x))


def chain(*middle: keras.Layer) -> keras.Model:
    """Build a network with layers in its middle."""
    end = [layers.GlobalAveragePooling2D(), layers.Dense(3)]
    return keras.Sequential([keras.Input((48, 48, 1)), *middle, *end])


def shared() -> keras.Model:
    """Build a network that uses a layer twice."""
    layer, faces = conv(1, 3), keras.Input((48, 48, 1))
    x = layers.GlobalAveragePooling2D()(layer(layer(faces)))
    return keras.Model(faces, layers.Dense(3)(x))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (doubled(10), r"layer concatenate\w* has the output \[512, 48, 48\]"),
        (chain(layers.ZeroPadding2D(500)), r"has the output \[1, 1048, 1048\]"),
        (chain(layers.ReLU(threshold=0.5)), "threshold of its layer ReLU is 0.5"),
        (chain(keras.Sequential([conv(2, 3)])), "layer Sequential, not one of"),
        (shared(), r"layer conv2d\w* is used more than once"),
        (chain(layers.SeparableConv2D(1, 1, depth_multiplier=999)), "has the output"),
        (chain(layers.Rescaling([0.5])), "scales each channel differently"),
        (
            chain(
                layers.Reshape((48, 48)),
                layers.GroupNormalization(8),
                layers.Reshape((48, 48, 1)),
            ),
            "does not normalize images",
        ),
    ],
)
def test_what_is_refused(model: keras.Model, reason: str, tmp_path: Path) -> None:
    path = save_model(model, tmp_path / "model.h5")
    with pytest.raises(UserError, match=f"not a model file .*{reason}"):
        utils.load_model(path)


def test_any_number_of_faces_is_predicted() -> None:
    network = utils.load_model(ROOT / utils.MODEL_PATH)
    faces = RANDOM.random((utils.CHUNK + 3, 48, 48, 1), np.float32)
    together = network.predict(faces)
    assert together.shape == (len(faces), 6) and together.dtype == np.float32
    np.testing.assert_allclose(together.sum(axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(network.predict(faces[-1:]), together[-1:], atol=1e-6)
    assert network.predict(faces[:0]).shape == (0, 6)


def test_prediction_needs_no_tensorflow_and_no_network(tmp_path: Path) -> None:
    images = ["data/astronaut.jpg", "data/demo/test/happy/00.png"]
    output = tmp_path / "records"
    script = f"""
import json, sys
events = []
def note(event, arguments):
    is_path = event == "open" and isinstance(arguments[0], str)
    if is_path and set("wax+") & set(arguments[1] or "") or event.startswith("socket."):
        events.append([event, str(arguments[0])])
sys.addaudithook(note)
import predict
for kind in ("text", "json", "csv"):
    words = ["--image", *{images}, "--format", kind, "--output", {str(output)!r}]
    assert predict.main(words) == 0
heavy = "tensorflow", "keras", "pandas", "matplotlib", "scipy", "cv2", "openvino.tools"
print(json.dumps([[name for name in heavy if sys.modules.get(name)], events]))
"""
    options = {"cwd": ROOT, "env": {"HOME": str(tmp_path), "PATH": ""}}
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, **options)
    assert result.returncode == 0, result.stderr
    imported, events = json.loads(result.stdout)
    assert imported == []
    assert events == 3 * [["open", str(output)]]
    assert list(tmp_path.iterdir()) == [output]  # nor is anything written at home


def test_only_the_network_s_own_arrays_are_read(tmp_path: Path) -> None:
    path = save_model(small_model(), tmp_path / "model.h5")
    expected = utils.load_model(path).weights
    with h5py.File(path, "r+") as file:
        file.attrs["layer_names"] = ["dense"] * 99  # of which Keras would read these
        file["model_weights"].attrs["layer_names"] = ["dense"] * 99
        file["dense"] = h5py.ExternalLink("/dev/zero", "x")
        file["loop"] = file["model_weights"]
    assert_same_arrays(utils.load_model(path).weights, expected)
