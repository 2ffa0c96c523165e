"""--ensemble joins networks into one, which answers with the mean of what they say."""

import json
from pathlib import Path
from unittest.mock import Mock

import h5py
import keras
import numpy as np
import pytest
from conftest import make_tree

import train
import utils

CLASSES = ["angry", "happy", "sad"]
FACES = np.random.default_rng(1).random((5, 48, 48, 1), np.float32)


def network(seed: int, *filters: int) -> keras.Model:
    """Build a network whose answers are far from those of another seed."""
    keras.utils.set_random_seed(seed)
    model = train.build_model((48, 48, 1), 3, filters, 5)
    kernel, _ = model.layers[-1].get_weights()
    model.layers[-1].set_weights([9 * kernel, np.random.normal(size=3)])
    return model


def save(model: keras.Model, path: Path, class_names: list[str] = CLASSES) -> Path:
    """Write a model file."""
    about = {"class_names": class_names, "rescale": utils.RESCALE}
    utils.save_model(model, path, about)
    return path


def mean(*answers: np.ndarray) -> np.ndarray:
    """Return the geometric mean of probabilities."""
    product = np.prod(np.array(answers, np.float64), axis=0) ** (1 / len(answers))
    return product / product.sum(axis=1, keepdims=True)


def test_the_answer_is_the_mean(tmp_path: Path) -> None:
    models = network(1, 4, 6), network(2, 4, 6), network(3, 8)
    answers = [model.predict_on_batch(FACES) for model in models]
    assert abs(answers[0] - answers[1]).max() > 0.1
    joined = train.join(models)
    expected = mean(*answers)
    np.testing.assert_allclose(joined.predict_on_batch(FACES), expected, atol=1e-5)
    path = save(joined, tmp_path / "joined.h5")
    loaded, _ = utils.load_model(path)
    by_keras = keras.saving.load_model(path, compile=False)
    answer = loaded.predict_on_batch(FACES)  # of kernels that are rounded in the file
    np.testing.assert_allclose(answer, expected, atol=2e-3)
    np.testing.assert_allclose(by_keras.predict_on_batch(FACES), answer, atol=1e-5)
    twice = train.join([joined, models[0]]).predict_on_batch(FACES)
    np.testing.assert_allclose(twice, mean(expected, answers[0]), atol=1e-5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, empty_figures: None) -> Path:
    """Return a folder with faces/, and a network that tells them apart, first.h5."""
    folder = tmp_path_factory.mktemp("ensemble")
    make_tree(folder / "faces", CLASSES)
    save(network(1, 4, 6), folder / "first.h5")
    return folder


def main(folder: Path, name: str, *options: str) -> None:
    """Train a small network on faces/ in this process, for an epoch of two steps."""
    words = ["--epochs", "1", "--filters", "4", "--dense-units", "4", *options]
    words += ["--data-dir", str(folder / "faces"), "--classes", *CLASSES]
    train.main([*words, "--model-path", str(folder / name), "--precision", "float32"])


def test_a_training_joins_its_network_with_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(folder, "alone.h5")
    ensemble = ["--ensemble", str(folder / "first.h5")]
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="full"):
        patch.setattr(train, "write_results", Mock(side_effect=OSError("full")))
        main(folder, "joined.h5")
    main(folder, "joined.h5", *ensemble, "--resume")  # only the end of it needs them
    models = [
        utils.load_model(folder / name)[0]
        for name in ("alone.h5", "first.h5", "joined.h5")
    ]
    alone, first, joined = [model.predict_on_batch(FACES) for model in models]
    np.testing.assert_allclose(joined, mean(alone, first), atol=1e-5)
    with h5py.File(folder / "joined.h5") as file:
        arguments = json.loads(file.attrs["arguments"])
        accuracy = json.loads(file.attrs["test"])["accuracy"]
    assert arguments["ensemble"] == ["first.h5"]
    index, _ = utils.index_folder(folder / "faces" / "test", CLASSES)
    assert accuracy == utils.evaluate(models[2], index)["test"]["accuracy"]


def test_the_whole_is_calibrated(folder: Path) -> None:
    options = ["--validation-split", "0.25", "--ensemble", str(folder / "first.h5")]
    main(folder, "calibrated.h5", *options)
    with h5py.File(folder / "calibrated.h5") as file:
        temperature = json.loads(file.attrs["temperature"])
    first, whole = [
        utils.load_model(folder / name)[0].layers[-1].get_weights()[0]
        for name in ("first.h5", "calibrated.h5")
    ]
    assert whole.shape == (4 + 5, 3)
    np.testing.assert_allclose(whole[4:], first / 2 / temperature, rtol=1e-3)


def test_a_network_of_other_classes(folder: Path) -> None:
    path = save(network(1, 4), folder / "other.h5", ["sad", "happy", "angry"])
    with pytest.raises(SystemExit, match="tells sad, happy, angry apart, not angry, h"):
        main(folder, "none.h5", "--ensemble", str(folder / "first.h5"), str(path))
    assert not list(folder.glob("none*"))


def test_no_network_is_joined_twice_by_a_resumed_run(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        main(folder, "first.h5", "--ensemble", str(folder / "faces/../first.h5"))
    assert error.value.code == 2
    assert (
        "first.h5 is what this training will replace; name another"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("layer", "inputs", "reason"),
    [
        ("networks", "first second", None),  # as it was
        # What is doubled again and again fills memory.
        ("networks", "first first", "first"),
        ("networks", "first none", "none"),
        ("networks", "probabilities", "probabilities"),
        ("probabilities", "first", "first"),
        ("probabilities", "", "list index out of range"),
    ],
)
def test_files_with_other_joints_are_refused(
    tmp_path: Path, layer: str, inputs: str, reason: str | None
) -> None:
    path = save(train.join([network(1, 4), network(2, 4)]), tmp_path / "joined.h5")
    with h5py.File(path, "r+") as file:
        config = json.loads(file.attrs["model_config"])
        entries = {entry["name"]: entry for entry in config["config"]["layers"]}
        joint = utils.name_inputs(entries["networks"], "")
        names = dict(zip(("first", "second"), joint, strict=True))
        tensors = [
            {"config": {"keras_history": [names.get(name, name), 0, 0]}}
            for name in inputs.split()
        ]
        entries[layer]["inbound_nodes"] = [{"args": [tensors], "kwargs": {}}]
        file.attrs["model_config"] = json.dumps(config)
    if reason is None:
        utils.load_model(path)
        return
    with pytest.raises(utils.UserError) as error:
        utils.load_model(path)
    assert names.get(reason, reason) in str(error.value)
