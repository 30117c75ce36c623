"""The paper's schedule against its tables, and how many network shapes it needs."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest

import tinyjax
from experiments.paper import protocol
from experiments.paper import protocol as paper
from tinyjax.models import ResNet18

SITES = tuple(f"conv_{i}" for i in (2, 3, 5, 6, 8, 9, 11, 12))


def walk(protocol):
    """Additions and widths of every growth of algorithm 1, always due."""
    schedule = paper.algorithm_1(
        dict(zip(SITES, protocol.neurons)), dict(zip(SITES, protocol.final)), lambda step: step + 1
    )
    widths, history = dict(zip(SITES, protocol.start)), []
    while added := schedule(len(history), widths, history):
        assert len(added) == 1
        widths = {name: width + added.get(name, 0) for name, width in widths.items()}
        history.append(added)
        yield added, dict(widths)


@pytest.mark.parametrize(("s", "extensions"), [(1 / 4, 16), (1 / 64, 21)])
def test_every_block_reaches_its_width_in_the_paper_s_number_of_extensions(s, extensions):
    protocol = paper.figure_5(s)
    growths = list(walk(protocol))
    assert len(growths) == 8 * extensions == protocol.growths
    assert growths[-1][1] == dict(zip(SITES, (64, 64, 128, 128, 256, 256, 512, 512)))
    # Table 2, and one site after the other.
    assert all(added == {SITES[i % 8]: paper.NEURONS[i % 8]} for i, (added, _) in enumerate(growths))
    assert protocol.epochs == protocol.growths * 0.25 + 250


@pytest.mark.parametrize("s", protocol.STARTS)
def test_the_whole_schedule_needs_at_most_eight_network_shapes(s):
    """Traced at CIFAR's shape; the start is allocated at the first rung."""
    protocol = paper.figure_5(s)
    policy, final = tinyjax.multiple_of(8), dict(zip(SITES, protocol.final))
    growths = list(walk(protocol))
    capacities = [tuple(policy(growths[0][1], final).values())]
    for _, widths in growths:
        if any(width > capacity for width, capacity in zip(widths.values(), capacities[-1])):
            capacities.append(tuple(policy(widths, final).values()))
    assert capacities[-1] == protocol.final
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)
    shapes = set()
    for widths in capacities:
        init = partial(ResNet18(widths, num_classes=100).init, train=False)
        variables = jax.eval_shape(init, jax.random.key(0), images)
        shapes.add(tuple(leaf.shape for leaf in jax.tree.leaves(variables)))
    assert len(shapes) == len(capacities) <= 8


def test_a_growth_looks_at_more_images_where_they_are_small():
    samples = protocol.estimation_samples(protocol.figure_5(), size=32, training_set=50_000)
    assert samples == (256, 256, 256, 256, 2048, 2048, 16384, 16384)  # E.1: 1, 21, 1328 and 50,000, clipped
    assert all(3 * n // 4 % 384 == 0 for n in samples[4:])  # whole micro-batches
    assert samples[4] * 3 // 4 >= 1328
    in_one = protocol.figure_5()._replace(estimation_limit=2048, estimation_micro_batch=None)
    assert protocol.estimation_samples(in_one, size=32, training_set=50_000)[4:] == (1771, 1771, 2048, 2048)


def test_a_thinner_stream_gives_a_thinner_network():
    images = jnp.zeros((2, 8, 8, 1))
    model = ResNet18((3,) * 8, num_classes=3, stream=(2, 4, 6, 8))
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    blocks = [variables["params"][name] for name in SITES]
    assert [block["in"]["conv"]["kernel"].shape for block in blocks] == [(3, 3, c, 3) for c in (2, 2, 4, 4, 6, 6, 8, 8)]
    with pytest.raises(ValueError, match="inner widths of 8 blocks; got 2"):
        jax.eval_shape(partial(ResNet18((3, 3), num_classes=3).init, train=False), jax.random.key(0), images)
