"""The growing run of `versus_gromo` with gromo 0.1.0 (PyTorch), the library of the paper's authors.

Runs in an environment of its own, which has torch and gromo and not tinyjax:

    python peer_gromo.py DATA.npz '{"epochs": 20, ...}'

Reads the arrays and the order of the samples that `versus_gromo` has written; prints one JSON line a repetition.
"""

import json
import sys
import time
import warnings

import numpy as np
import torch
from gromo.containers.growing_mlp import GrowingMLP
from gromo.utils.utils import set_device

warnings.filterwarnings("ignore", message="Using the pseudo-inverse")


def run(arrays, config):
    device = torch.device("cuda" if config["device"] == "gpu" else "cpu")
    set_device(device)
    names = ("train_x", "train_y", "test_x", "test_y")
    train_x, train_y, test_x, test_y = (torch.from_numpy(arrays[name]).to(device) for name in names)
    train_y, test_y = train_y.long(), test_y.long()
    orders = torch.from_numpy(arrays["order"]).long().to(device)
    torch.manual_seed(config["seed"])
    loss_fn = torch.nn.CrossEntropyLoss()
    model = GrowingMLP(
        in_features=train_x.shape[1],
        out_features=10,
        hidden_size=config["start"],
        number_hidden_layers=2,
        activation=torch.nn.ReLU(),
        device=device,
    )
    # The last quarter is the line search's, as in tinyjax.
    cut = len(train_x) - len(train_x) // 4
    statistics, search = (train_x[:cut], train_y[:cut]), (train_x[cut:], train_y[cut:])
    seconds = {"train": 0.0, "statistics": 0.0, "solve": 0.0, "search": 0.0}
    growths = 0

    def widths():
        return [layer.weight.shape[0] for layer in model.layers[:-1]]

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def clocked(name, began):
        seconds[name] += now() - began

    def train(epoch):
        for rows in orders[epoch]:
            optimizer.zero_grad()
            loss_fn(model(train_x[rows]), train_y[rows]).backward()
            optimizer.step()

    def grow(site):
        model.set_growing_layers(index=site)
        began = now()
        model.init_computation()
        model.zero_grad()
        loss_fn(model(statistics[0]), statistics[1]).backward()
        model.update_computation()
        clocked("statistics", began)
        began = now()
        room = config["final"] - widths()[site]
        # Its default thresholds are absolute; 1e-6 lets it add the neurons that the schedule asks for.
        model.compute_optimal_updates(
            maximum_added_neurons=min(config["neurons"], room), statistical_threshold=1e-6, numerical_threshold=1e-6
        )
        model.reset_computation()
        model.dummy_select_update()
        clocked("solve", began)
        began = now()
        layer = model.currently_updated_layer
        losses = []
        with torch.no_grad():
            # gromo scales both sides of a neuron by its factor: the square root of an amplitude.
            factors = np.sqrt(np.geomspace(1e-3, 1e1, config["amplitudes"]))
            for factor in factors:
                layer.scaling_factor = float(factor)
                losses.append(loss_fn(model.extended_forward(search[0]), search[1]).item())
        layer.scaling_factor = float(factors[int(np.nanargmin(losses))])
        model.apply_change()
        clocked("search", began)

    began = now()
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    for epoch in range(config["epochs"]):
        if epoch:
            turns = [site for site in ((epoch - 1) % 2, epoch % 2) if widths()[site] < config["final"]]
            if turns:
                grow(turns[0])
                growths += 1
                optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
        start = now()
        train(epoch)
        clocked("train", start)
    total = now() - began
    with torch.no_grad():
        accuracy = {
            name: (model(x).argmax(-1) == y).float().mean().item()
            for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y))
        }
    return {"seconds": total, "parts": seconds, "accuracy": accuracy, "widths": widths(), "growths": growths}


def main():
    config = json.loads(sys.argv[2])
    torch.set_num_threads(config["threads"])
    arrays = np.load(sys.argv[1])
    for repetition in range(config["repetitions"]):
        print(json.dumps({"library": "gromo", "repetition": repetition} | run(arrays, config)), flush=True)


if __name__ == "__main__":
    main()
