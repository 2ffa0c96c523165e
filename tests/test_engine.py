"""OpenVINO computes what Keras computes, for every kind of layer that is allowed.

The reference is Keras on TensorFlow, whose model is saved and loaded.
"""

import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import ROOT, assert_same_arrays, randomize, save_model

import utils

layers = keras.layers
RANDOM = np.random.default_rng(1)
TRAINING_ONLY = "SpatialDropout2D GaussianNoise ActivityRegularization RandomRotation"
LAYERS = {  # that take 12 x 12 pixels of 6 channels
    "conv": layers.Conv2D(4, (3, 2), strides=2, padding="same", use_bias=False),
    "conv groups": layers.Conv2D(9, (2, 4), groups=3, strides=(1, 3)),
    "depthwise": layers.DepthwiseConv2D(3, depth_multiplier=2, strides=2),
    "depthwise same": layers.DepthwiseConv2D((3, 2), padding="same", dilation_rate=2),
    "separable": layers.SeparableConv2D(5, 3, strides=2, depth_multiplier=3),
    "dense": layers.Dense(4, use_bias=False, activation="gelu"),
    "max pooling": layers.MaxPooling2D((3, 2), strides=(2, 5), padding="same"),
    "average pooling": layers.AveragePooling2D(5, strides=3, padding="same"),
    "global max": layers.GlobalMaxPooling2D(),
    "global average": layers.GlobalAveragePooling2D(),
    "batch normalization": layers.BatchNormalization(epsilon=0.1),
    "layer normalization": layers.LayerNormalization(epsilon=0.01, scale=False),
    "group normalization": layers.GroupNormalization(3, epsilon=0.01),
    "relu": layers.ReLU(max_value=0.5, negative_slope=0.1),
    "leaky relu": layers.LeakyReLU(0.3),
    "prelu": layers.PReLU(),
    "prelu shared": layers.PReLU(shared_axes=[1, 2]),
    "elu": layers.ELU(0.7),
    "softmax": layers.Softmax(),
    "reshape": layers.Reshape((9, -1, 6)),
    "zero padding": layers.ZeroPadding2D(((1, 2), (3, 0))),
    "rescaling": layers.Rescaling(2.5, offset=-1),
}
LAYERS |= {f"activation {name}": layers.Activation(name) for name in utils.ACTIVATIONS}
LAYERS |= {name: getattr(layers, name)(0.5) for name in TRAINING_ONLY.split()}


def assert_same(model: keras.Model, path: Path) -> None:
    """Compare what the engine and Keras say about random faces."""
    randomize(model)
    network = utils.load_model(save_model(model, path))
    faces = RANDOM.random((5, 48, 48, 1), np.float32)
    expected = model.predict_on_batch(faces)
    assert expected.std(axis=0).max() > 1e-4  # faces differ in their answers
    np.testing.assert_allclose(network.predict(faces, tta=False), expected, atol=1e-5)
    assert_same_arrays(network.weights, model.get_weights())


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_layers_of_images(layer: keras.Layer, tmp_path: Path) -> None:
    begin = [keras.Input((48, 48, 1)), layers.Conv2D(6, 4, strides=4)]
    end = [layers.Flatten(), layers.Dense(3, activation="softmax")]
    assert_same(keras.Sequential([*begin, layer, *end]), tmp_path / "model.h5")


def test_branches_and_layers_of_rows(tmp_path: Path) -> None:
    faces = keras.Input((48, 48, 1))
    x = layers.Conv2D(6, 4, strides=4, activation="silu")(faces)
    x = layers.Add()([x, layers.Conv2D(6, 3, padding="same")(x)])  # a residual block
    row = layers.Dense(6)(layers.GlobalAveragePooling2D()(x))
    row = layers.BatchNormalization(scale=False, center=False)(row)
    row = layers.PReLU()(layers.LayerNormalization()(row))
    greatest = layers.GlobalMaxPooling2D(keepdims=True)(x)
    x = layers.Multiply()([x, layers.Reshape((1, 1, 6))(row), greatest])
    x = layers.Concatenate()([x, layers.Dropout(0.1)(x)])
    x = layers.Concatenate()([layers.Flatten()(x), row])
    answer = layers.Dense(3, activation="softmax")(x)
    assert_same(keras.Model(faces, answer), tmp_path / "model.h5")


def test_any_number_of_faces_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "CHUNK", 4)
    network = utils.load_model(ROOT / utils.MODEL_PATH)
    faces = RANDOM.random((7, 48, 48, 1), np.float32)
    together = network.predict(faces)
    assert together.shape == (7, 6) and together.dtype == np.float32
    np.testing.assert_allclose(network.predict(faces[-1:]), together[-1:], atol=1e-6)


def test_prediction_needs_no_tensorflow_and_no_network(tmp_path: Path) -> None:
    output = tmp_path / "records"
    script = f"""
import sys
def note(event, arguments):
    is_path = event == "open" and isinstance(arguments[0], str)
    if is_path and set("wax+") & set(arguments[1] or "") or event.startswith("socket."):
        print(event, arguments[0])
sys.addaudithook(note)
import predict
for kind in ("text", "json", "csv"):
    words = ["--image", "data/astronaut.jpg", "--format", kind, "--output"]
    predict.main([*words, {str(output)!r}])
heavy = "tensorflow", "keras", "pandas", "matplotlib", "scipy", "cv2", "openvino.tools"
print([name for name in heavy if sys.modules.get(name)])
"""
    options = {"cwd": ROOT, "env": {"HOME": str(tmp_path), "PATH": ""}}
    words = [sys.executable, "-c", script]
    result = subprocess.run(words, capture_output=True, text=True, **options)
    assert (result.stdout, result.stderr) == (f"open {output}\n" * 3 + "[]\n", "")
    assert list(tmp_path.iterdir()) == [output]  # nor is anything written at home
