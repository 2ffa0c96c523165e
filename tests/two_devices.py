"""Train on two logical devices; test_precision.py runs this in a process of its own.

    python tests/two_devices.py FOLDER_WITH_TRAIN_AND_TEST

It prints as JSON how far training moves the weights, how far those of one device are
from those of two, likewise the losses shown, and how far a resumed run begins from
where the first one stopped.
"""

import argparse
import contextlib
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import train

tf = train.tf
MirroredStrategy = tf.distribute.MirroredStrategy
DEVICES = ["CPU:0", "CPU:1"]


def use(devices: int) -> None:
    """Make train.py see so many GPUs, which are logical CPU devices in truth."""
    tf.config.list_logical_devices = lambda kind: DEVICES[:devices]
    tf.distribute.MirroredStrategy = lambda: MirroredStrategy(DEVICES)


def weights_of(
    devices: int, args: argparse.Namespace
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Train three steps, each device on the same eight faces; before, after, loss."""
    use(devices)
    generator = np.random.default_rng(1)
    faces = generator.random((8, 48, 48, 1), np.float32)
    labels = np.eye(3, dtype=np.float32)[generator.integers(0, 3, 8)]
    model = train.make_model(args, steps=3, dropout=0)
    assert model.distribute_strategy.num_replicas_in_sync == devices
    batch = (np.tile(faces, (devices, 1, 1, 1)), np.tile(labels, (devices, 1)))
    batches = tf.data.Dataset.from_tensors(batch).repeat(3)
    before = model.get_weights()
    swap = train.keras.callbacks.SwapEMAWeights()
    history = model.fit(batches, verbose=0, callbacks=[swap]).history
    return before, model.get_weights(), history["loss"][-1]


def states_at_the_stop(words: list[str]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Stop a training after an epoch and resume it; return both sides' variables."""
    states = []

    class Checkpoint(train.Checkpoint):
        def on_train_begin(self, logs: dict | None = None) -> None:
            super().on_train_begin(logs)
            if self.state:
                states.append([np.array(v.value) for v in self.variables()])

        def on_epoch_end(self, epoch: int, logs: dict) -> None:
            super().on_epoch_end(epoch, logs)
            if epoch == 0:
                states.append([np.array(v.value) for v in self.variables()])
                raise KeyboardInterrupt

    train.Checkpoint = Checkpoint
    with contextlib.suppress(SystemExit):
        train.main(words)
    train.main([*words, "--resume"])
    return states[0], states[1]


def distance(some: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Return the largest difference of any weight."""
    pairs = zip(some, others, strict=True)
    return max(float(np.abs(a - b).max()) for a, b in pairs)


if __name__ == "__main__":
    cpu = tf.config.list_physical_devices("CPU")[0]
    both = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, both)
    folder = sys.argv[1]
    words = "--classes angry happy sad --filters 4 --dense-units 4 --batch-size 8"
    words = [*words.split(), "--precision", "float32", "--data-dir", folder]
    args = train.parse_args(words)
    before, one, loss = weights_of(1, args)
    _, two, loss_of_two = weights_of(2, args)
    words += ["--epochs", "2", "--model-path", f"{folder}/model.h5"]
    figures = {
        "moved": distance(before, one),
        "one and two": distance(one, two),
        "losses": abs(loss - loss_of_two),
        "resumed": distance(*states_at_the_stop(words)),
    }
    print(json.dumps(figures))
