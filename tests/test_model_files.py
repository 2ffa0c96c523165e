"""A model file from anyone is either loaded whole or refused in one line.

Where Keras or HDF5 would obey a payload, it is shown to work there.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from conftest import save_model, small_model

import train
import utils
from utils import UserError

KERNEL = "model_weights/dense/face_classifier/dense/kernel"
SHAPE = 12 * 12 * 8, 5  # of that kernel
ELSEWHERE = f"its {KERNEL} is not stored whole, plain or by deflate"
NO_ARRAY = f"its {KERNEL} is not in it, a link, or no array of float32 or float16"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a small model file."""
    keras.backend.clear_session()  # so that the first dense layer is named dense
    path = tmp_path_factory.mktemp("whole") / "model.h5"
    return save_model(small_model(), path).read_bytes()


@pytest.fixture
def path(whole: bytes, tmp_path: Path) -> Path:
    """Return a small model file to break."""
    (tmp_path / "model.h5").write_bytes(whole)
    return tmp_path / "model.h5"


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


def edit_config(path: Path, edit: Callable[[list[dict]], None]) -> None:
    """Change the layers in a model file's configuration."""
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        edit(config["config"]["layers"])
        file.attrs["model_config"] = json.dumps(config)


def find_layer(layers: list[dict], kind: str) -> dict[str, Any]:
    """Return the configuration of the first layer of a kind."""
    return next(layer["config"] for layer in layers if layer["class_name"] == kind)


def test_no_model_file(tmp_path: Path) -> None:
    for place in (tmp_path / "model.h5", tmp_path):
        with pytest.raises(UserError, match=r"no model file there.*python train\.py"):
            utils.load_model(place)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89HDF\r\n\x1a\n", "half"])
def test_no_hdf5(path: Path, whole: bytes, content: bytes | str) -> None:
    path.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    assert refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model_config", None, "it holds no model_config, perhaps weights only"),
        ("rescale", None, "it holds no rescale"),
        ("rescale", "1.0", "its rescale is 1.0, not 1 / 255"),
        ("class_names", '["angry", "happy"]', "it has 3 outputs for 2 classes"),
        ("class_names", "[1, 2, 3]", "its class names are [1, 2, 3]"),
        ("class_names", '["sad", "sad", "happy"]', "its class names are "),
        ("class_names", '["a", "b", "\\u001b[2J"]', "its class names are "),
        ("class_names", "7", ""),
        ("class_names", "angry", ""),
        ("class_names", 7, "its class_names is no text, or too long"),
        ("class_names", '["=1+1", "b", "c"]', "its class names are "),
        ("class_names", ["x" * 999] * 99, "its class_names is no text, or too long"),
        ("class_names", "[" * 100_000, ""),
        ("class_names", " " * 2**21, "a text in it is too long"),
        ("model_config", "{}", ""),
        ("model_config", '{"class_name": "Functional", "config": {"layers": []}}', ""),
        ("model_config", '{"class_name": "Sequential", "config": {"layers": []}}', ""),
        ("model_config", '{"class_name": "Sequential", "config": []}', ""),
    ],
)
def test_attributes(path: Path, name: str, value: object, reason: str) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
        if value is not None:
            file.attrs[name] = value
    assert reason in refusal(path)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (None, "its model_weights/dense lists no weights"),
        (["x"] * 17, "its model_weights/dense lists too many weights"),
        (["kernel"], "its model_weights/dense/kernel is not in it"),
        ([".."], "its dense/kernel is not in it"),
        ([], "its dense/kernel is not in it"),
        ([1], "expected str"),
    ],
)
def test_names_of_arrays(path: Path, names: list | None, reason: str) -> None:
    with h5py.File(path, "r+") as file:
        attributes = file["model_weights/dense"].attrs
        del attributes["weight_names"]
        if names is not None:
            attributes["weight_names"] = names
    assert refusal(path).startswith(reason)


@pytest.mark.parametrize(
    "shape", [[48, 64, 1], [8, 8, 1], [512, 512, 1], [48, 48, 3], [48, 48]]
)
def test_other_input(path: Path, shape: list[int]) -> None:
    edit_config(path, lambda ls: ls[0]["config"].update(batch_shape=[None, *shape]))
    assert (
        refusal(path)
        == f"its input is {(None, *shape)}, not (None, n, n, 1), n of 12 to 256"
    )


@pytest.mark.parametrize(
    ("kind", "name", "value", "reason"),
    [
        ("Dense", "units", 10**12, "units of its layer Dense is 1000000000000"),
        ("Conv2D", "filters", 10**6, "has shape"),
        ("Conv2D", "kernel_size", [10**6, 10**6], "has shape"),
        ("Dense", "units", 6, "has shape"),
        ("Dense", "lora_rank", 5_000_000, "lora_rank of its layer Dense is 5000000"),
        ("Conv2D", "groups", 2, "has shape"),
        ("Dense", "units", -1, ""),
        ("Dense", "units", "5", ""),
        ("Dense", "activation", "mish", "activation of its layer Dense is mish"),
        ("Conv2D", "data_format", "channels_first", "data_format of its layer"),
        ("Conv2D", "strides", [0, 0], ""),
        ("Conv2D", "unheard_of", 1, "unheard_of of its layer"),
        ("MaxPooling2D", "pool_size", [10**9, 10**9], ""),
        ("Dense", "dtype", "float16", "dtype of its layer Dense is float16"),
        ("Dense", "name", "a/b", ""),
        ("BatchNormalization", "axis", list(range(50)), "axis of its layer"),
        ("BatchNormalization", "axis", 1, "axis of its layer"),
    ],
)
def test_configurations(
    path: Path, kind: str, name: str, value: object, reason: str
) -> None:
    edit_config(path, lambda layers: find_layer(layers, kind).update({name: value}))
    assert reason in refusal(path)


def test_too_deep(path: Path) -> None:
    edit_config(path, lambda layers: layers.extend(layers[-2:] * 100))
    assert "too deep" in refusal(path)


def test_weights_that_are_nan(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[KERNEL][0, 0] = np.nan
    assert refusal(path) == "some of its weights are NaN or infinite"


def test_a_lambda_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    touch = eval(f"lambda x: [x, open({str(target)!r}, 'w')][0]")
    layer = keras.layers.Lambda(touch, output_shape=(48, 48, 1))
    model = keras.Sequential([keras.Input((48, 48, 1)), layer])
    path = save_model(model, tmp_path / "m.h5")
    target.unlink(missing_ok=True)
    reason = "it holds a layer Lambda, not one of utils.LAYERS: Conv2D, Depthwise"
    assert refusal(path).startswith(reason)
    assert not target.exists()
    loaded = keras.saving.load_model(path, compile=False, safe_mode=False)
    loaded(np.zeros((1, 48, 48, 1)))
    assert target.exists()


OS_SYSTEM = {
    "module": "os",
    "class_name": "system",
    "config": "echo > touched",
    "registered_name": "system",
}


@pytest.mark.parametrize("place", ["activation", "dtype", "name", "units"])
def test_objects_of_other_modules_are_refused(path: Path, place: str) -> None:
    edit_config(path, lambda ls: find_layer(ls, "Dense").update({place: OS_SYSTEM}))
    assert refusal(path)


@pytest.mark.parametrize("name", ["kernel_initializer", "kernel_regularizer"])
def test_settings_for_training_only_are_ignored(path: Path, name: str) -> None:
    edit_config(path, lambda ls: find_layer(ls, "Dense").update({name: OS_SYSTEM}))
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(path, compile=False)  # which looks at it
    utils.load_model(path)


@contextlib.contextmanager
def replacing_kernel(path: Path) -> Generator[h5py.Group, None, None]:
    """Yield the group in which something else is to stand for the kernel."""
    with h5py.File(path, "r+") as file:
        group = file[KERNEL].parent
        del group["kernel"]
        yield group


@pytest.mark.parametrize("kind", ["raw", "virtual", "external link", "soft link"])
def test_nothing_outside_the_file_is_read(path: Path, kind: str) -> None:
    secret, raw = path.with_name("secret.h5"), path.with_name("secret.raw")
    sevens = np.full(SHAPE, 7, np.float32)
    sevens.tofile(raw)
    with h5py.File(secret, "w") as file:
        file["secret"] = sevens
    with replacing_kernel(path) as group:
        if kind == "raw":
            external = [(raw, 0, h5py.h5f.UNLIMITED)]
            group.create_dataset("kernel", SHAPE, np.float32, external=external)
        elif kind == "virtual":
            layout = h5py.VirtualLayout(SHAPE, np.float32)
            layout[...] = h5py.VirtualSource(secret, "secret", SHAPE)
            group.create_virtual_dataset("kernel", layout)
        elif kind == "external link":
            group["kernel"] = h5py.ExternalLink(secret, "secret")
        else:
            group.file["secret"] = sevens
            group["kernel"] = h5py.SoftLink("/secret")
    with h5py.File(path) as file:  # HDF5 itself reads it
        assert (file[KERNEL][:] == 7).all()
    assert refusal(path) == (NO_ARRAY if "link" in kind else ELSEWHERE)


def test_a_link_to_nothing(path: Path) -> None:
    with replacing_kernel(path) as group:
        group["kernel"] = h5py.SoftLink("/nowhere")
    assert refusal(path) == NO_ARRAY


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"shape": (10**6, 10**6)}, f"its {KERNEL} has shape (1000000, 1000000), not"),
        ({}, ELSEWHERE),  # declared and not written
        ({"chunks": (1, 1)}, ELSEWHERE),
        ({"data": np.zeros(SHAPE), "compression": "lzf"}, ELSEWHERE),
        ({"dtype": np.float64}, NO_ARRAY),
        ({"dtype": "S4"}, NO_ARRAY),
    ],
)
def test_other_arrays(path: Path, options: dict[str, Any], reason: str) -> None:
    with replacing_kernel(path) as group:
        options = {"shape": SHAPE, "dtype": np.float32} | options
        group.create_dataset("kernel", **options)
    assert refusal(path).startswith(reason)


def test_a_group_instead_of_an_array(path: Path) -> None:
    with replacing_kernel(path) as group:
        group.create_group("kernel")
    assert refusal(path) == NO_ARRAY


@pytest.mark.parametrize("content", [zlib.compress(bytes(10**7)), b"no zlib data"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_chunks_of_another_size_than_declared(
    path: Path, shuffle: bool, content: bytes
) -> None:
    options = {"chunks": SHAPE, "compression": "gzip", "shuffle": shuffle}
    with replacing_kernel(path) as group:
        kernel = group.create_dataset("kernel", SHAPE, "f4", **options)
        kernel.id.write_direct_chunk((0, 0), content)
    assert refusal(path) == ELSEWHERE


def test_arrays_that_are_read_repeatedly_count_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "MAX_BYTES", 10**6)
    model = train.build_model((48, 48, 1), 3, filters=[4, 32], dense_units=1)
    path = save_model(model, tmp_path / "model.h5")

    def edit(layers: list[dict]) -> None:
        kinds = [layer["class_name"] for layer in layers]
        last = kinds.index("Flatten") - 3  # takes what it gives: 32 channels
        layers[last:last] = [layers[last]] * 150

    edit_config(path, edit)
    assert refusal(path) == "its network has more weights than a file may hold"


def test_a_file_that_is_too_large(path: Path) -> None:
    os.truncate(path, utils.MAX_BYTES + 1)  # sparse: takes no space
    assert refusal(path) == "it is larger than 200 MB"


@pytest.mark.parametrize(("free", "refused"), [(0, True), (8, True), (16, False)])
def test_what_makes_hdf5_loop_for_ever_is_refused(
    path: Path, free: int, refused: bool
) -> None:
    texts = struct.pack("<H6xQ8s", 1, 3, b"abc") + struct.pack("<H6xQ", 0, free)
    heap = struct.pack("<4sB3xQ", b"GCOL", 1, 16 + len(texts)) + texts
    path.write_bytes(path.read_bytes() + heap)
    if refused:
        assert refusal(path) == "HDF5 would never finish reading it"
    else:
        assert utils.load_model(path).class_names
