"""Statistics of one convolutional growth with gromo 0.1.0 (PyTorch), for `conv_versus_gromo`.

Runs in an environment of its own, which has torch and gromo and not tinyjax:

    python peer_gromo_conv.py DATA.npz '{"restricted": 2000, "full": 250, ...}'

Prints one JSON line a kind and repetition: milliseconds per image of forward, backward and update of the statistics of
one block of a thin ResNet, whose images pass in batches.
"""

import json
import sys
import time
import warnings

import numpy as np
import torch
from gromo.containers.resnet import init_full_resnet_structure
from gromo.modules.conv2d_growing_module import FullConv2dGrowingModule, RestrictedConv2dGrowingModule
from gromo.utils.utils import set_device

warnings.filterwarnings("ignore")
KINDS = {"restricted": RestrictedConv2dGrowingModule, "full": FullConv2dGrowingModule}


def measure(kind, images, labels, config):
    device = torch.device("cuda" if config["device"] == "gpu" else "cpu")
    set_device(device)
    images, labels = images.to(device), labels.to(device)
    torch.manual_seed(0)
    model = init_full_resnet_structure(
        input_shape=(1, 28, 28),
        in_features=1,
        out_features=10,
        hidden_channels=tuple((config["hidden"],) * 2 for _ in range(2)),
        number_of_blocks_per_stage=2,
        inplanes=config["channels"],
        nb_stages=2,
        small_inputs=True,
        growing_conv_type=KINDS[kind],
        device=device,
    )
    model.set_growing_layers(index=0)
    loss_fn = torch.nn.CrossEntropyLoss()
    began = time.perf_counter()
    model.init_computation()
    for start in range(0, len(images), config["batch"]):
        model.zero_grad()
        loss_fn(model(images[start : start + config["batch"]]), labels[start : start + config["batch"]]).backward()
        model.update_computation()
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return {"library": "gromo", "kind": kind, "images": len(images), "ms_per_image": 1e3 * seconds / len(images)}


def main():
    config = json.loads(sys.argv[2])
    torch.set_num_threads(config["threads"])
    arrays = np.load(sys.argv[1])
    images = torch.from_numpy(arrays["x"]).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(arrays["y"]).long()
    for kind in KINDS:
        for _ in range(config["repetitions"]):
            count = config[kind]
            print(json.dumps(measure(kind, images[:count], labels[:count], config)), flush=True)


if __name__ == "__main__":
    main()
