"""The paper's ResNet-18 and VGG, thin, on tiny random images: found, grown, compacted."""

from functools import partial
from itertools import permutations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

import tinyjax
from tinyjax.core.params import named_leaves
from tinyjax.models import VGG, ResNet18

CAPACITY, START = 3, 1
INNER = [f"conv_{i}/in/conv" for i in (2, 3, 5, 6, 8, 9, 11, 12)]


def images(n=16, size=8):
    rng = np.random.default_rng(0)
    return {"x": jnp.asarray(rng.normal(size=(n, size, size, 3))), "y": jnp.asarray(np.arange(n) % 3)}


def initialised(model, batch):
    """He-normal kernels and neutral normalisations in float64; the initialisers are not run."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), batch["x"])

    def draw(path, leaf):
        name = path[-1].key
        if name == "kernel":
            return jnp.asarray(rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1])))
        return jnp.full(leaf.shape, float(name in ("scale", "var")))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def loss_of(model):
    def loss_fn(variables, batch):
        logits, updates = model.apply(variables, batch["x"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean(), updates

    return loss_fn


@pytest.fixture(scope="module")
def resnet():
    model, batch = ResNet18((CAPACITY,) * 8, num_classes=3), images()
    variables = initialised(model, batch)
    loss_fn = loss_of(model)
    sites = tinyjax.find_sites(loss_fn, variables, batch, has_aux=True)
    return loss_fn, variables, batch, sites


def test_the_inner_widths_of_all_blocks_can_grow_and_the_stream_cannot(resnet):
    _, _, _, sites = resnet
    assert list(sites.growable.names) == INNER
    for site in sites.growable:
        block = site.name.removesuffix("/in/conv")
        assert site.capacity == CAPACITY
        assert [k.leaf for k in site.consumers] == [f"params/{block}/out/conv/kernel"]
        assert site.norm is not None and site.norm.scale == f"params/{block}/in/norm/scale"
        assert site.norm.var == f"batch_stats/{block}/in/norm/var"
    refused = [site for site in sites if not site.growable]
    assert {site.capacity for site in refused} == {64, 128, 256, 512}
    assert all("producers (a residual stream" in site.reason for site in refused)
    assert len(refused) == 4


@pytest.mark.slow
def test_growing_the_resnet_and_compacting_it(resnet):
    """Two sites in one round; the loss of the batch does not rise; the compact network is the same function."""
    loss_fn, variables, batch, sites = resnet
    variables = tinyjax.thin(variables, sites.growable, START)
    chosen = [sites[INNER[0]], sites[INNER[5]]]
    grow_step = tinyjax.make_grow_step(
        loss_fn, chosen, num_neurons=2, method=partial(tinyjax.methods.tiny, ridge=1e-2), has_aux=True
    )
    new, info = grow_step(variables, batch)
    for site in chosen:
        assert int(info.width[site.name]) == START + 2 == int(tinyjax.width(new, site))
        assert info.loss_after[site.name] <= info.loss_before[site.name]
        assert info.psi_after[site.name] <= info.psi_before[site.name]
        leaves = named_leaves(new)
        assert np.all(leaves[site.norm.var] > 0) and np.all(np.isfinite(leaves[site.norm.mean]))
        assert np.any(leaves[site.norm.mean][START:] != 0)
    changed = {name for name, leaf in named_leaves(new).items() if np.any(leaf != named_leaves(variables)[name])}
    own = {leaf for s in chosen for leaf in [m.leaf for m in s.members]}
    assert changed <= own

    small, widths = tinyjax.compact(new, sites.growable)
    assert [widths[name] for name in INNER] == [START + 2 * (i in (0, 5)) for i in range(8)]
    rebuilt = ResNet18(tuple(widths[name] for name in INNER), num_classes=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal(a.shape, b.shape),
        small,
        jax.eval_shape(partial(rebuilt.init, train=False), jax.random.key(0), batch["x"]),
    )
    wide = ResNet18((CAPACITY,) * 8, num_classes=3)
    for train in (False, True):
        logits = [
            jax.jit(partial(model.apply, train=train, mutable=["batch_stats"]))(v, batch["x"])[0]
            for model, v in ((rebuilt, small), (wide, new))
        ]
        np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-10)


class Chain(nn.Module):
    """Three convolutions in a row, each normalised or not."""

    bias: bool
    norm: bool

    @nn.compact
    def __call__(self, x, *, train):
        for name in ("first", "second", "third"):
            x = nn.Conv(12, (3, 3), strides=1 + (name == "second"), use_bias=self.bias, name=name)(x)
            if self.norm:
                x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name=f"{name}_norm")(x)
            x = nn.relu(x)
        return nn.Dense(3, name="head")(x.mean((1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", [True, False])
def test_one_site_many_times_and_three_in_every_order_in_one_program(bias, norm):
    model, batch = Chain(bias, norm), images(24, 5)
    loss_fn = loss_of(model)
    variables = initialised(model, batch)
    sites = tinyjax.find_sites(loss_fn, variables, batch, has_aux=True).growable
    assert sites.names == ("first", "second", "third")
    start = tinyjax.thin(variables, sites, 2)
    grow_step = tinyjax.make_grow_step(
        loss_fn, sites, num_neurons=1, method=partial(tinyjax.methods.tiny, ridge=1e-2), has_aux=True
    )
    traces = []

    @jax.jit
    def grow(variables, neurons):
        traces.append(None)
        return grow_step(variables, batch, neurons=neurons)

    def run(order):
        variables, last, widths = start, np.inf, dict.fromkeys(sites.names, 2)
        for name in order:
            variables, info = grow(variables, {n: jnp.asarray(int(n == name)) for n in sites.names})
            before, after = float(info.loss_before[name]), float(info.loss_after[name])
            assert np.isfinite(after) and after <= before
            assert before <= last * (1 + 1e-12)
            last = after
            widths[name] += 1
            assert {n: int(tinyjax.width(variables, sites[n])) for n in sites.names} == widths
        np.testing.assert_allclose(loss_fn(variables, batch)[0], last, rtol=1e-10)
        return last

    first = float(loss_fn(start, batch)[0])
    assert run(["second"] * 10) < first
    for order in permutations(sites.names):
        assert run(order) < first
    assert len(traces) == 1


@pytest.mark.slow
def test_vgg_grows_at_every_convolution_and_dense_layer():
    model, batch = VGG(((3,), (4, 5)), num_classes=3, dense=(6,)), images(24, 8)
    loss_fn = loss_of(model)
    variables = initialised(model, batch)
    sites = tinyjax.find_sites(loss_fn, variables, batch, has_aux=True)
    assert {s.name: s.capacity for s in sites.growable} == {
        "conv_1_1/conv": 3, "conv_2_1/conv": 4, "conv_2_2/conv": 5, "dense_1": 6,
    }  # fmt: skip
    assert len(sites) == len(sites.growable)
    start = tinyjax.thin(variables, sites, 2)
    new, info = tinyjax.make_grow_step(loss_fn, sites, num_neurons=1, has_aux=True)(start, batch)
    losses = [float(info.loss_before[sites[0].name]), *(float(info.loss_after[name]) for name in sites.names)]
    assert all(b <= a for a, b in zip(losses, losses[1:])) and losses[-1] < losses[0]
    assert all(int(info.width[name]) == 3 for name in sites.names)
    small, widths = tinyjax.compact(new, sites)
    rebuilt = VGG(((3,), (3, 3)), num_classes=3, dense=(3,))
    assert set(widths.values()) == {3}
    for train in (False, True):
        logits = [
            m.apply(v, batch["x"], train=train, mutable=["batch_stats"])[0] for m, v in ((rebuilt, small), (model, new))
        ]
        np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-10)
