"""Schedules, costs and batch sizes: plain numbers in, plain numbers out."""

from typing import NamedTuple

import jax
import pytest

from tests.support.handmade_sites import EXAMPLES, mlp
from tests.support.zoo import images, layers
from tinyjax.core.batch import batch_size
from tinyjax.discovery.sites import find_sites
from tinyjax.surgery import compact, thin
from tinyjax.training.cost_model import flops
from tinyjax.training.schedules.basic import early, every, most_gain, round_robin
from tinyjax.training.schedules.costs import (
    estimation_batch,
    flop_cost,
    forward_flops,
    learning_batch,
    parameter_cost,
    parameters,
)
from tinyjax.training.schedules.limits import budget, plateau, worthwhile


class Record(NamedTuple):
    gain_predicted: dict


def run(schedule, widths, steps, history=()):
    """Grows as told; returns the additions by step and the last widths."""
    events = {}
    for step in range(steps):
        added = schedule(step, widths, history)
        if added:
            events[step] = added
            widths = {name: width + added.get(name, 0) for name, width in widths.items()}
    return events, widths


def test_every_grows_all_sites_up_to_their_final_widths():
    schedule = every(10, {"a": 2, "b": 3}, final={"a": 4, "b": 8}, start=5)
    events, widths = run(schedule, {"a": 1, "b": 2, "c": 7}, 60)
    assert events == {5: {"a": 2, "b": 3}, 15: {"a": 1, "b": 3}}
    assert widths == {"a": 4, "b": 8, "c": 7}
    assert run(every(10, 1, final=9, until=20), {"a": 1}, 60)[0] == {0: {"a": 1}, 10: {"a": 1}}


def test_round_robin_takes_turns_and_skips_full_sites():
    events, widths = run(round_robin(10, 2, final={"a": 5, "b": 3, "c": 5}), {"a": 1, "b": 2, "c": 1}, 100)
    assert [next(iter(e.items())) for e in events.values()] == [("a", 2), ("b", 1), ("c", 2), ("a", 2), ("c", 2)]
    assert list(events) == [0, 10, 20, 30, 40] and widths == {"a": 5, "b": 3, "c": 5}


def test_most_gain_measures_each_site_once_then_takes_the_best_rate():
    schedule = most_gain(1, 2, final=20, cost=lambda name, widths: {"a": 1.0, "b": 10.0, "c": 1.0}[name])
    widths = {"a": 2, "b": 2, "c": 2}
    first = [Record({"a": 1.0})]
    assert schedule(0, widths, []) == {"a": 2}
    assert schedule(1, widths, first) == {"b": 2}
    known = [*first, Record({"b": 5.0}), Record({"c": 0.9, "a": float("nan")})]
    assert schedule(2, widths, known) == {"a": 2}
    assert schedule(3, widths, [*known, Record({"a": 0.1})]) == {"c": 2}
    assert schedule(3, widths, [*known, Record({"b": 50.0})]) == {"b": 2}
    assert schedule(3, {"a": 20, "b": 20, "c": 20}, known) == {}


def test_most_gain_by_scores_that_come_from_outside():
    scores = {"a": 1.0, "b": 3.0}
    schedule = most_gain(1, 2, final=20, cost=lambda *_: 1.0, gains=lambda history: scores)
    assert schedule(0, {"a": 2, "b": 2}, [Record({"a": 99.0})]) == {"b": 2}
    scores["a"] = 4.0
    assert schedule(0, {"a": 2, "b": 2}) == {"a": 2}


def test_a_plateau_lets_grow_when_losses_no_longer_fall():
    losses = []
    schedule = plateau(every(1, 4, final=9), losses, window=3, least=0.1)
    events = []
    for step in range(40):
        if schedule(step, {"a": 2}):
            events.append(step)
            losses.clear()
        losses.append(1.0 + 0.5 ** (step - (events or [0])[-1]))  # every growth makes the loss fall again
    # losses 2, 1.5, 1.25, ...: (1.125, 1.0625, 1.031) is the first window less than a tenth above the next
    assert events == [9, 18, 27, 36]
    assert plateau(every(1, 4, final=9), [3.0, 2.0, 1.0, 0.9], window=2)(0, {"a": 2}) == {}
    with pytest.raises(ValueError, match="`window` must be at least 1 loss, got 0"):
        plateau(every(1, 4, final=9), losses, window=0)


def test_a_growth_is_worthwhile_where_it_gains_more_than_training():
    losses, scores = [5.0, 4.0], {"a": 1.5, "b": 0.5}
    schedule = worthwhile(every(1, 1, final=9), losses, lambda history: scores, window=2)
    widths = {"a": 2, "b": 2, "c": 2}
    assert schedule(0, widths) == {}  # two losses are one window
    losses += [4.0, 3.0]  # training gains 1
    assert schedule(0, widths) == {"a": 1, "c": 1}  # nothing is known of c
    losses += [4.0, 3.0]  # nothing
    assert schedule(0, widths) == {"a": 1, "b": 1, "c": 1}
    assert worthwhile(every(1, 1, final=9), losses, lambda history: {}, window=9)(0, widths) == {}


def test_early_spreads_growth_over_the_first_quarter_and_arrives():
    events, widths = run(early(1000, 5, final={"a": 64, "b": 10}), {"a": 4, "b": 7}, 1000)
    assert list(events) == [50, 100, 150, 200, 250]
    assert [e.get("a") for e in events.values()] == [12] * 5
    assert [e.get("b", 0) for e in events.values()] == [1, 1, 1, 0, 0] and widths == {"a": 64, "b": 10}


def test_early_makes_up_for_a_failed_growth():
    schedule = early(100, 2, final=10)
    assert (schedule(12, {"a": 2}), schedule(25, {"a": 2}), schedule(25, {"a": 6})) == ({"a": 4}, {"a": 8}, {"a": 4})


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_are_counted_as_the_compact_network_has_them(name):
    example = EXAMPLES[name]()
    widths = {site.name: 2 for site in example.sites}
    small, _ = compact(thin(example.params, example.sites, 2), example.sites)
    small = small.get("params", small) if name == "flat" else small
    total = sum(x.size for x in jax.tree.leaves(small))
    outside = {"mlp": 3, "torch_like": 2, "flat": 3}.get(name, 0)  # output biases, which no site runs through
    assert parameters(example.sites, widths) + outside == total


def test_a_neuron_costs_its_fan_in_bias_and_fan_out_at_the_current_widths():
    cost = parameter_cost(mlp().sites)
    assert cost("fc1", {"fc1": 3, "fc2": 2}) == 5 + 1 + 2
    assert cost("fc2", {"fc1": 3, "fc2": 2}) == 3 + 1 + 3


COUNTED = (
    layers.linen, layers.shared_layer, layers.scan_over_layers, layers.scan_over_time, layers.flat_rows,
    images.convolutions,
    images.channels_first, images.used_twice, images.dense_over_pixels, images.two_readers,
)  # fmt: skip
OUTSIDE = {"scan_over_layers": 2 * 5 * 3}  # the readout of a stream that is as wide as the data


@pytest.mark.parametrize("build", COUNTED, ids=lambda build: build.__name__)
def test_operations_are_those_of_the_traced_forward_pass(build):
    """Against a count over the jaxpr of the loss, less the products that no site has."""
    model = build()
    sites = find_sites(model.loss_fn, model.params, model.batch)
    per_sample = flops(model.loss_fn, model.params, model.batch) / batch_size(model.batch)
    assert forward_flops(sites, {}) + OUTSIDE.get(build.__name__, 0) == per_sample


def test_a_neuron_costs_its_products_at_the_current_widths():
    model = layers.linen()  # 5 -> Dense_0 -> Dense_1 -> 3
    sites = find_sites(model.loss_fn, model.params, model.batch)
    assert flop_cost(sites)("Dense_0", {"Dense_0": 3, "Dense_1": 2}) == 2 * (5 + 2)
    assert flop_cost(sites)("Dense_1", {"Dense_0": 3, "Dense_1": 2}) == 2 * (3 + 3)
    model = images.channels_first()
    sites = find_sites(model.loss_fn, model.params, model.batch)
    one = flop_cost(sites)(sites.names[0], dict.fromkeys(sites.names, 1))
    two = flop_cost(sites)(sites.names[0], dict.fromkeys(sites.names, 2))
    assert one < two  # a wider consumer makes a channel dearer


def test_budget_grants_neurons_while_they_fit():
    sites = mlp().sites
    schedule = budget(every(1, 4, final=9), lambda widths: parameters(sites, widths), limit=60)
    widths = {"fc1": 2, "fc2": 2}
    assert parameters(sites, widths) == 24
    added = schedule(0, widths)
    after = {name: width + added[name] for name, width in widths.items()}
    assert added == {"fc1": 2, "fc2": 2} and parameters(sites, after) == 56
    assert schedule(1, after) == {}


def test_batch_sizes_of_the_paper():
    # the extremes over the paper's network, METHODS: 0.65 at the first layers, 339,739 at the last
    wide = {"kernel_area": 9, "positions": 16, "training_set": 10**9}
    assert estimation_batch(512, **wide) == 339_739
    assert estimation_batch(512, **wide, constant=0.01) == 3_397_387
    assert estimation_batch(64, kernel_area=9, positions=1024, training_set=50_000) == 1
    # never fewer data points than inputs, never more than there are
    assert estimation_batch(2, kernel_area=9, positions=4, training_set=50_000, constant=1e-9) == 5
    assert estimation_batch(512, kernel_area=9, positions=16, training_set=50_000) == 50_000
    assert estimation_batch(784, kernel_area=1, positions=1, training_set=60_000) == 60_000


def test_learning_batch_follows_the_square_root_of_complexity():
    assert learning_batch(100, initial_complexity=100) == 32
    assert learning_batch(1600, initial_complexity=100) == 128
    batch = 32.0
    for before, after in [(100, 170), (170, 400), (400, 1000)]:
        batch *= (after / before) ** 0.5
    assert learning_batch(1000, initial_complexity=100) == round(batch)


def test_misuse_names_the_thing():
    with pytest.raises(ValueError, match="`period` must be at least 1 step, got 0"):
        every(0, 1, final=3)
    with pytest.raises(ValueError, match="`neurons` must be at least 1, got 0"):
        round_robin(1, {"a": 0}, final=3)
    with pytest.raises(ValueError, match="`final` must be at least 1, got -1"):
        early(100, 2, final=-1)
    with pytest.raises(ValueError, match="no site `z`; the sites are `a`"):
        every(1, 1, final={"z": 3})(0, {"a": 1})
    with pytest.raises(ValueError, match=r"`fraction` must be in \(0, 1\], got 1.5"):
        early(100, 2, final=3, fraction=1.5)
    with pytest.raises(ValueError, match=r"`events` must be in 1 .. 25, .* got 30"):
        early(100, 30, final=3)
    with pytest.raises(ValueError, match="`cost` of a neuron at site `a` is 0; it must be positive"):
        most_gain(1, 1, final=3, cost=lambda name, widths: 0)(0, {"a": 1}, [])
    with pytest.raises(ValueError, match="`positions` must be at least 1, got 0"):
        estimation_batch(3, kernel_area=1, positions=0, training_set=10)
    with pytest.raises(ValueError, match="`constant` must be positive"):
        estimation_batch(3, kernel_area=1, positions=1, training_set=10, constant=0)
    with pytest.raises(ValueError, match="`complexity` must be positive, got 0"):
        learning_batch(0, initial_complexity=1)
