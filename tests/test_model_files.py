"""A model file from anyone is either loaded whole or refused in one line.

Where Keras or HDF5 would obey a payload, it is shown to work there.
"""

import contextlib
import json
import os
import shutil
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from conftest import CLASSES, assert_same_arrays, save_model, small_model

import utils
from utils import UserError

KERNEL = "model_weights/dense/face_classifier/dense/kernel"
SHAPE = 12 * 12 * 8, 5  # of that kernel
ELSEWHERE = f"its {KERNEL} is not stored whole, plain or by deflate"
LINK = " is missing, or a link"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model file."""
    keras.backend.clear_session()  # so that the first dense layer is named dense
    return save_model(small_model(), tmp_path_factory.mktemp("whole") / "model.h5")


@pytest.fixture
def path(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of it to break."""
    return shutil.copy(whole, tmp_path / "model.h5")


def refusal(path: Path) -> str:
    """Return why a model file is refused."""
    with pytest.raises(UserError) as error:
        utils.load_model(path)
    begin = f"{path}: not a model file that train.py wrote: "
    end = "; make one with: python train.py"
    text = str(error.value)
    assert text.startswith(begin) and text.endswith(end)
    assert text.isprintable() and len(text) < 1000
    return text.removeprefix(begin).removesuffix(end)


@contextlib.contextmanager
def changing_layers(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the layers in a model file's configuration, to be changed."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        yield config["config"]["layers"]
        file.attrs["model_config"] = json.dumps(config)


def test_bytes_that_are_no_whole_hdf5_file(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "truncated file" in refusal(path)
    heap = struct.pack("<4sB3xQ", b"GCOL", 1, 32) + bytes(16)  # free space of size 0
    path.write_bytes(whole + heap)
    assert refusal(path) == "HDF5 would never finish reading it"
    os.truncate(path, utils.MAX_BYTES + 1)  # sparse: takes no space
    assert refusal(path) == "it is larger than 200 MB"
    path.write_bytes(b"PK")
    newer = path.rename(path.with_suffix(".keras"))
    assert refusal(newer) == "it is a model in Keras' newer format"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model_config", None, "it holds no model_config, perhaps weights only"),
        ("rescale", "1.0", "its rescale is 1.0, not 1 / 255"),
        ("class_names", '["angry", "happy"]', "it has 3 outputs for 2 classes"),
        ("class_names", '["a", "b", "\\u001b[2J"]', "its class names are "),
        ("class_names", '["=1+1", "b", "c"]', "its class names are "),
        ("class_names", " " * 2**21, "its class_names is no text, or too long"),
    ],
)
def test_attributes(path: Path, name: str, value: object, reason: str) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("kind", "name", "value", "reason"),
    [
        ("InputLayer", "batch_shape", [None, 48, 48, 3], "input is (None, 48, 48, 3)"),
        ("Dense", "units", 10**12, "units of its layer Dense is 1000000000000"),
        ("Conv2D", "filters", 10**6, "has shape"),
        ("Conv2D", "data_format", "channels_first", "data_format of its layer"),
        ("Conv2D", "unheard_of", 1, "unheard_of of its layer"),
        ("Dense", "activation", "mish", "activation of its layer Dense is mish"),
        ("Dense", "dtype", "float16", "dtype of its layer Dense is float16"),
        ("BatchNormalization", "axis", 1, "axis of its layer"),
    ],
)
def test_settings(path: Path, kind: str, name: str, value: Any, reason: str) -> None:
    with changing_layers(path) as layers:
        layer = next(layer for layer in layers if layer["class_name"] == kind)
        layer["config"][name] = value
    assert reason in refusal(path)


def test_a_lambda_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    touch = eval(f"lambda x: [x, open({str(target)!r}, 'w')][0]")
    layer = keras.layers.Lambda(touch, output_shape=(48, 48, 1))
    model = keras.Sequential([keras.Input((48, 48, 1)), layer])
    path = save_model(model, tmp_path / "m.h5")
    assert refusal(path).startswith("it holds a layer Lambda, not one of utils.LAYERS:")
    assert not target.exists()
    loaded = keras.saving.load_model(path, compile=False, safe_mode=False)
    loaded(np.zeros((1, 48, 48, 1)))
    assert target.exists()


def test_functions_of_other_modules_are_not_called(path: Path) -> None:
    target = path.with_name("made")
    call = {"module": "os", "class_name": "mkdir", "config": str(target)}
    with changing_layers(path) as layers:
        layers[-1]["config"]["kernel_initializer"] = call
    assert utils.load_model(path).class_names == CLASSES  # only training needs that
    with changing_layers(path) as layers:
        layers[-1]["config"]["activation"] = call
    assert refusal(path).startswith("activation of its layer Dense is {'module': 'os'")
    assert not target.exists()


@pytest.mark.parametrize("kind", ["raw", "virtual", "external link", "soft link"])
def test_nothing_outside_the_file_is_read(path: Path, kind: str) -> None:
    secret = shutil.copy(path, path.with_name("secret.h5"))
    with h5py.File(secret, "r+") as file:
        file[KERNEL][:] = 7
        offset, size = file[KERNEL].id.get_offset(), file[KERNEL].nbytes
    with h5py.File(path, "r+") as file:
        place = file[KERNEL].parent.name
        del file[KERNEL]
        if kind == "raw":
            external = [(secret, offset, size)]
            file.create_dataset(KERNEL, SHAPE, np.float32, external=external)
        elif kind == "virtual":
            layout = h5py.VirtualLayout(SHAPE, np.float32)
            layout[...] = h5py.VirtualSource(secret, KERNEL, SHAPE)
            file.create_virtual_dataset(KERNEL, layout)
        elif kind == "external link":
            del file[place]
            file[place] = h5py.ExternalLink(secret, place)
        else:
            file["way out"] = h5py.ExternalLink(secret, KERNEL)
            file[KERNEL] = h5py.SoftLink("/way out")
    with h5py.File(path) as file:  # HDF5 itself reads it
        assert (file[KERNEL][:] == 7).all()
    assert LINK in refusal(path) if "link" in kind else refusal(path) == ELSEWHERE


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, ELSEWHERE),  # declared and not written
        ({"data": np.zeros(SHAPE), "compression": "lzf"}, ELSEWHERE),
        ({"data": np.full(SHAPE, np.nan)}, "some of its weights are NaN or infinite"),
    ],
)
def test_arrays(path: Path, options: dict[str, Any], reason: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[KERNEL]
        options = {"shape": SHAPE, "dtype": np.float32} | options
        file.create_dataset(KERNEL, **options)
    assert refusal(path) == reason


def test_a_compressed_array_has_the_declared_size(path: Path) -> None:
    plain = utils.load_model(path).weights
    options = {"chunks": SHAPE, "compression": "gzip", "shuffle": True}
    with h5py.File(path, "r+") as file:
        file.create_dataset(KERNEL, data=file.pop(KERNEL), **options)
    assert_same_arrays(utils.load_model(path).weights, plain)
    with h5py.File(path, "r+") as file:
        file[KERNEL].id.write_direct_chunk((0, 0), zlib.compress(bytes(10**7)))
    assert refusal(path) == ELSEWHERE


def test_networks_are_limited(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(utils, "MAX_BYTES", 300_000)
    with changing_layers(path) as layers:
        layers[-10:-10] = [layers[-10]] * 150  # a convolution of 2304 bytes
    assert refusal(path) == "its network has more weights than a file may hold"
    with changing_layers(path) as layers:
        settings = {"name": "padding", "padding": [[500, 500], [500, 500]]}
        layers[1:] = [{"class_name": "ZeroPadding2D", "config": settings}]
    assert "padding has the output [1, 1048, 1048]" in refusal(path)
