"""A model file from anyone is either loaded whole or refused in one line.

Where Keras or HDF5 would obey a payload, it is shown to work there.
"""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

import train
import utils
from utils import UserError

CLASSES = ["angry", "happy", "sad"]
KERNEL = "model_weights/dense/face_classifier/dense/kernel"
ELSEWHERE = f"its {KERNEL} does not stand in the file as it is"


def save(model: keras.Model, path: Path) -> Path:
    """Save a network as train.py does, whatever it is made of."""
    train.save_model(model, path, {"class_names": CLASSES, "rescale": 1 / 255})
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the bytes of a small model file."""
    keras.backend.clear_session()  # so that the first dense layer is named dense
    model = train.build_model((48, 48, 1), 3, filters=[4, 8], dense_units=5)
    path = tmp_path_factory.mktemp("whole") / "model.h5"
    return save(model, path).read_bytes()


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


def test_a_whole_file_is_loaded(path: Path) -> None:
    assert utils.load_model(path).class_names == CLASSES


def test_models_made_earlier_are_loaded(path: Path) -> None:
    def use_relu(layers: list[dict]) -> None:
        for layer in layers:
            if layer["class_name"] == "Activation":
                kept = {"name": layer["config"]["name"]}
                layer |= {"class_name": "ReLU", "config": kept}

    edit_config(path, use_relu)
    network = utils.load_model(path)
    faces = np.random.default_rng(1).random((3, 48, 48, 1), np.float32)
    expected = keras.saving.load_model(path, compile=False).predict_on_batch(faces)
    np.testing.assert_allclose(network.predict(faces, tta=False), expected, rtol=1e-4)


def test_no_model_file(tmp_path: Path) -> None:
    for place in (tmp_path / "model.h5", tmp_path):
        with pytest.raises(UserError, match=r"no model file there.*python train\.py"):
            utils.load_model(place)


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\x89HDF\r\n\x1a\n", None])
def test_no_hdf5(path: Path, whole: bytes, content: bytes | None) -> None:
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert refusal(path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("model_config", None, "it holds no model_config, perhaps weights only"),
        ("rescale", None, "it holds no rescale"),
        ("rescale", "1.0", "it was trained on other pixels than gray in [0, 1]"),
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
        ("class_names", " " * 2**21, "its class_names is no text, or too long"),
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


def test_weights_only(path: Path) -> None:
    model = keras.saving.load_model(path, compile=False)
    weights = path.with_suffix(".weights.h5")
    model.save_weights(weights)
    assert "perhaps weights only" in refusal(weights)


@pytest.mark.parametrize("shape", [[48, 64, 1], [8, 8, 1], [512, 512, 1], [48, 48, 3]])
def test_other_input(path: Path, shape: list[int]) -> None:
    edit_config(path, lambda ls: ls[0]["config"].update(batch_shape=[None, *shape]))
    assert refusal(path) == f"its input is {(None, *shape)}, not gray squares"


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
        ("InputLayer", "batch_shape", [None, 48, 48], "its input is"),
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


def test_weights_that_are_no_numbers(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file[KERNEL][0, 0] = np.nan
    assert refusal(path) == "some of its weights are no numbers"


def test_a_lambda_is_not_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    touch = eval(f"lambda x: [x, open({str(target)!r}, 'w')][0]")
    layer = keras.layers.Lambda(touch, output_shape=(48, 48, 1))
    path = save(keras.Sequential([keras.Input((48, 48, 1)), layer]), tmp_path / "m.h5")
    target.unlink(missing_ok=True)
    assert refusal(path) == "it holds a layer Lambda, not one of utils.LAYERS"
    assert not target.exists()
    model = keras.saving.load_model(path, compile=False, safe_mode=False)
    model(np.zeros((1, 48, 48, 1)))
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


def test_layers_of_other_modules_are_refused(path: Path) -> None:
    edit_config(path, lambda layers: layers.insert(1, OS_SYSTEM))
    assert refusal(path) == "it holds a layer system, not one of utils.LAYERS"


@pytest.mark.parametrize("name", ["kernel_initializer", "kernel_regularizer"])
def test_what_only_training_needs_is_passed_over(path: Path, name: str) -> None:
    edit_config(path, lambda ls: find_layer(ls, "Dense").update({name: OS_SYSTEM}))
    with pytest.raises((TypeError, ValueError)):
        keras.saving.load_model(path, compile=False)  # which looks at it
    utils.load_model(path)


def replace_kernel(path: Path, plant: Callable[[h5py.Group, tuple], None]) -> None:
    """Put something else where the first dense layer's weights were."""
    with h5py.File(path, "r+") as file:
        group, shape = file[KERNEL].parent, file[KERNEL].shape
        del group["kernel"]
        plant(group, shape)


def test_an_external_dataset_is_not_read(path: Path) -> None:
    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        # The first bytes of this file, as the weights.
        group.create_dataset(
            "kernel", shape, np.float32, external=[(__file__, 0, h5py.h5f.UNLIMITED)]
        )

    replace_kernel(path, plant)
    with h5py.File(path) as file:  # HDF5 itself reads it
        assert file[KERNEL][:].tobytes()[:20] == Path(__file__).read_bytes()[:20]
    assert refusal(path) == ELSEWHERE


def test_a_virtual_dataset_is_not_read(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"

    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        with h5py.File(other, "w") as file:
            file["secret"] = np.full(shape, 7, np.float32)
        layout = h5py.VirtualLayout(shape, np.float32)
        layout[...] = h5py.VirtualSource(other, "secret", shape)
        group.create_virtual_dataset("kernel", layout)

    replace_kernel(path, plant)
    with h5py.File(path) as file:
        assert (file[KERNEL][:] == 7).all()
    assert refusal(path) == ELSEWHERE


@pytest.mark.parametrize("kind", ["external", "soft", "dangling"])
def test_links_are_not_followed(path: Path, tmp_path: Path, kind: str) -> None:
    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        if kind == "external":
            with h5py.File(tmp_path / "other.h5", "w") as file:
                file["secret"] = np.full(shape, 7, np.float32)
            group["kernel"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "secret")
        else:
            group.file["secret"] = np.full(shape, 7, np.float32)
            target = "/secret" if kind == "soft" else "/nowhere"
            group["kernel"] = h5py.SoftLink(target)

    replace_kernel(path, plant)
    if kind != "dangling":
        with h5py.File(path) as file:
            assert (file[KERNEL][:] == 7).all()
    assert refusal(path) == f"{KERNEL} is not in it, or a link to something else"


def test_declared_huge(path: Path) -> None:
    replace_kernel(
        path, lambda group, _: group.create_dataset("kernel", (10**6, 10**6), "f4")
    )
    assert "kernel has shape (1000000, 1000000), not (" in refusal(path)


@pytest.mark.parametrize("chunks", [None, (1, 1)])
def test_declared_and_not_written(path: Path, chunks: tuple[int, int] | None) -> None:
    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        group.create_dataset("kernel", shape, "f4", chunks=chunks)

    replace_kernel(path, plant)
    assert refusal(path) == ELSEWHERE


@pytest.mark.parametrize(
    "options", [{"compression": "lzf"}, {"dtype": np.float64}, {"dtype": "S4"}]
)
def test_other_arrays(path: Path, options: dict) -> None:
    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        data = np.zeros(shape, options.pop("dtype", np.float32))
        group.create_dataset("kernel", data=data, **options)

    replace_kernel(path, plant)
    assert refusal(path).startswith(f"its {KERNEL} ")


def test_a_group_in_an_array_s_place(path: Path) -> None:
    replace_kernel(path, lambda group, shape: group.create_group("kernel"))
    assert refusal(path) == f"its {KERNEL} is no array of float32 or float16"


@pytest.mark.parametrize("content", [zlib.compress(bytes(10**7)), b"no zlib data"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_what_unpacks_to_something_else_than_it_declares(
    path: Path, shuffle: bool, content: bytes
) -> None:
    def plant(group: h5py.Group, shape: tuple[int, int]) -> None:
        options = {"chunks": shape, "compression": "gzip", "shuffle": shuffle}
        kernel = group.create_dataset("kernel", shape, "f4", **options)
        kernel.id.write_direct_chunk((0, 0), content)

    replace_kernel(path, plant)
    assert refusal(path) == ELSEWHERE


def test_arrays_that_are_read_again_and_again_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(utils, "MAX_BYTES", 10**6)
    model = train.build_model((48, 48, 1), 3, filters=[4, 32], dense_units=1)
    path = save(model, tmp_path / "model.h5")

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
        with pytest.raises(UserError, match="a heap in it has no end"):
            utils.load_model(path)
    else:
        assert utils.load_model(path).class_names
