"""Fast training computes what plain Keras computes, and leaves plain float32 files.

FusedBatchNormalization is compared with Keras' own layer, precisions with float32.
"""

import json
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import run_train

import train


def train_step(
    layer: keras.layers.BatchNormalization, inputs: np.ndarray, errors: np.ndarray
) -> dict[str, np.ndarray]:
    """Run a layer forward and backward once; return all that comes out."""
    layer.build(inputs.shape)
    layer.gamma.assign([0.5, 1.0, 2.0])
    layer.beta.assign([-1.0, 0.0, 1.0])
    x = tf.constant(inputs)
    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = layer(x, training=True)
        loss = tf.reduce_sum(tf.cast(outputs, tf.float32) * errors)
    sources = {"inputs": x, "gamma": layer.gamma.value, "beta": layer.beta.value}
    figures = tape.gradient(loss, sources) | {
        "outputs": outputs,
        "mean": layer.moving_mean,
        "variance": layer.moving_variance,
    }
    return {k: np.asarray(tf.cast(v, tf.float32)) for k, v in figures.items()}


@pytest.mark.parametrize(
    ("policy", "tolerance"),
    [("float32", 2e-4), ("mixed_bfloat16", 0.02), ("mixed_float16", 5e-3)],
)
def test_fused_batch_normalization(policy: str, tolerance: float) -> None:
    generator = np.random.default_rng(1)
    inputs = generator.normal(3, 2, (8, 6, 6, 3)).astype(np.float32)
    errors = generator.normal(size=inputs.shape).astype(np.float32)
    options = {"momentum": 0.75, "dtype": policy}
    fused = train_step(train.FusedBatchNormalization(**options), inputs, errors)
    own = train_step(keras.layers.BatchNormalization(momentum=0.75), inputs, errors)
    n = 8 * 6 * 6  # the fused layer's variance is the unbiased one
    own["variance"] = 0.75 + (own["variance"] - 0.75) * n / (n - 1)
    for name, expected in own.items():
        scale = np.abs(expected).max()
        np.testing.assert_allclose(
            fused[name], expected, atol=tolerance * scale, err_msg=name
        )


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ("fpu avx2 avx512f avx512_bf16", "mixed_bfloat16"),
        ("fpu amx_bf16 amx_tile", "mixed_bfloat16"),
        ("fpu avx2 avx512f avx512_bf16_not", "float32"),
        (None, "float32"),  # no such file: Windows, macOS
    ],
)
def test_precision_of_processors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    path = tmp_path / "cpuinfo"
    if flags:
        path.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbogomips\t: 1\n")
    monkeypatch.setattr(train, "CPU_INFO", path)
    assert train.choose_precision() == precision


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [
        ([(9, 0), (8, 0)], "mixed_bfloat16"),
        ([(8, 6), (7, 5)], "mixed_float16"),
        ([(7, 0)], "mixed_float16"),
        ([(6, 1)], "float32"),
        ([None], "float32"),
    ],
)
def test_precision_of_gpus(
    monkeypatch: pytest.MonkeyPatch, capabilities: list, precision: str
) -> None:
    details = [{"compute_capability": c} if c else {} for c in capabilities]
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: details)
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: gpu)
    assert train.choose_precision() == precision


@pytest.mark.usefixtures("empty_figures")
@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_files_are_plain_float32(tree: Path, precision: str) -> None:
    path = tree.parent / "model.h5"
    run_train(tree, path, "--epochs", 2, "--precision", precision)
    model = keras.saving.load_model(path, compile=False)
    assert {layer.dtype_policy.name for layer in model.layers} == {"float32"}
    assert {type(layer).__module__.split(".")[0] for layer in model.layers} == {"keras"}
    assert keras.config.dtype_policy().name == "float32"
    metrics = json.loads((path.parent / "metrics.json").read_text())
    assert metrics["arguments"]["precision"] == precision


def test_first_and_last_layer_stay_float32_in_bfloat16() -> None:
    args = train.parse_args(["--filters", "4", "8", "--precision", "mixed_bfloat16"])
    model = train.make_model(args, steps=1000, dropout=0.5)
    assert model.layers[2].compute_dtype == "bfloat16"
    ends = {model.layers[0].compute_dtype, model.layers[-1].compute_dtype}
    assert ends == {"float32"}
    norms = [x for x in model.layers if isinstance(x, train.FusedBatchNormalization)]
    assert {layer.momentum for layer in norms} == {train.BATCH_MOMENTUM}
