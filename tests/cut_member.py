"""Cut one of the networks out of a model file that joins several.

    python tests/cut_member.py models/face_classification_model.h5 3 models/third.h5

Networks stand in it in the order of training: 1 is this file's own, then those of its
--ensemble. The joined file keeps the mean of their last biases alone, which each one
gets. The temperature is fitted again, on the validation part that all held out.
"""

import argparse
import json
from pathlib import Path

import h5py
import numpy as np
import validation

import train
import utils

KEPT = "arguments", "class_names", "color_mode", "image_size", "images", "rescale"


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("joined", type=Path)
    parser.add_argument("number", type=int, help="of the network, from 1 on")
    parser.add_argument("model", type=Path, help="the .h5 file to write")
    args = parser.parse_args()
    joined, class_names = utils.load_model(args.joined)
    with h5py.File(args.joined) as file:
        about = {name: json.loads(file.attrs[name]) for name in KEPT}
    for name in ("epochs", "seed", "ensemble"):  # those of the joined file's own
        about["arguments"].pop(name)
    members = len(joined.get_layer("networks").input)
    # Names do not tell whose a layer is (Keras counts its kinds, too); this path does.
    chain, layer = [], joined.get_layer("networks")
    tensor = layer.input[args.number - 1]
    while tensor is not joined.input:
        layer = tensor._keras_history.operation
        chain.insert(0, layer)
        tensor = layer.input
    weights = [array for layer in chain for array in layer.get_weights()]
    kernel, bias = joined.layers[-1].get_weights()
    own = np.split(kernel, members)[args.number - 1] * members
    filters = [layer.filters for layer in chain if hasattr(layer, "filters")][1::2]
    model = train.build_model((48, 48, 1), len(class_names), filters)
    model.set_weights([*weights, own, bias])
    _, fraction = validation.read_attributes(args.joined)
    known, test = (
        utils.index_folder(validation.ROOT / "data" / name, class_names)[0]
        for name in ("train", "test")
    )
    test.table["in_train"] = test.table.digest.isin(known.table.digest)
    _, held_out = train.split_validation(known, fraction)
    about["temperature"] = train.calibrate(model, held_out)
    with utils.replacing(args.model) as new:
        utils.save_model(model, new, about)
        saved, _ = utils.load_model(new)
        utils.write_attributes(new, utils.evaluate(saved, test))
    print(f"temperature {about['temperature']:.3f}, of {len(held_out.table)} images")


if __name__ == "__main__":
    main()
