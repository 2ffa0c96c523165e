"""Fast training computes what plain Keras computes, and leaves plain float32 files.

FusedBatchNormalization is compared with Keras' own layer.
"""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_train

import train


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("float32", 2e-4), ("mixed_bfloat16", 0.02), ("mixed_float16", 5e-3)],
)
def test_fused_batch_normalization(policy: str, tolerance: float) -> None:
    inputs = np.random.default_rng(1).normal(3, 2, (8, 6, 6, 3)).astype(np.float32)
    fused = train.FusedBatchNormalization(momentum=0.75, dtype=policy)
    own = keras.layers.BatchNormalization(momentum=0.75)
    results = []
    for layer in (fused, own):
        layer.build(inputs.shape)
        layer.gamma.assign([0.5, 1.0, 2.0])
        layer.beta.assign([-1.0, 0.0, 1.0])
        outputs = tf.cast(layer(inputs, training=True), tf.float32)
        results.append([outputs, layer.moving_mean, layer.moving_variance])
    n = 8 * 6 * 6  # the fused layer's variance is the unbiased one
    results[1][2] = 0.75 + (results[1][2] - 0.75) * n / (n - 1)
    for value, expected in zip(*results, strict=True):
        scale = np.abs(expected).max()
        np.testing.assert_allclose(value, expected, atol=tolerance * scale)


def test_auto_is_the_fastest_precision_of_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(train, "CPU_INFO", path)
    assert train.choose_precision() == "float32"  # no such file: Windows, macOS
    path.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\nbogomips\t: 1\n")
    assert train.choose_precision() == "mixed_bfloat16"
    path.write_text("processor\t: 0\nflags\t\t: fpu avx512f\nbogomips\t: 1\n")
    assert train.choose_precision() == "float32"


def test_auto_is_the_fastest_precision_of_the_oldest_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def choose(*gpus: dict) -> str:
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: gpus)
        return train.choose_precision()

    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: gpu)
    new, older = {"compute_capability": (8, 0)}, {"compute_capability": (7, 0)}
    assert choose(new) == "mixed_bfloat16"
    assert choose(new, older) == "mixed_float16"
    assert choose(new, {}) == "float32"


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_files_are_plain_float32(tree: Path, precision: str) -> None:
    path = tree.parent / "model.h5"
    run_train(tree, path, "--epochs", 1, "--precision", precision)
    model = keras.saving.load_model(path, compile=False)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert keras.config.dtype_policy().name == "float32"


def test_first_and_last_layer_stay_float32_in_bfloat16() -> None:
    args = train.parse_args(["--filters", "4", "8", "--precision", "mixed_bfloat16"])
    model = train.make_model(args, steps=1000, dropout=0.5)
    assert model.layers[2].compute_dtype == "bfloat16"
    ends = {model.layers[0].compute_dtype, model.layers[-1].compute_dtype}
    assert ends == {"float32"}
    norms = [x for x in model.layers if isinstance(x, train.FusedBatchNormalization)]
    assert {layer.momentum for layer in norms} == {train.BATCH_MOMENTUM}
