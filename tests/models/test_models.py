from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tinyjax.core.params import named_leaves
from tinyjax.models import (
    MLP,
    VGG,
    VGG11,
    VGG16,
    ResNet18,
    UnitDropout,
    WidthGroupNorm,
    WidthLayerNorm,
    WidthRMSNorm,
    inner_widths,
    unit_dropout,
    width_group_norm,
    width_layer_norm,
    width_rms_norm,
)
from tinyjax.models.resnet import Block

IMAGE32 = jnp.zeros((1, 32, 32, 3), jnp.float32)


def shapes(model: nn.Module, image, **options):
    return jax.eval_shape(lambda key: model.init(key, image, **options), jax.random.key(0))


def count(tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# --- architectures ---


def resnet_parameters(inner: list[int], num_classes: int) -> int:
    """Table 3 by hand: 3x3 kernels, a scale and a shift per channel, a dense layer at the end."""
    total, before = 0, 3
    for stage, stream in enumerate((64, 128, 256, 512)):
        total += 9 * before * stream + 2 * stream
        for width in inner[2 * stage : 2 * stage + 2]:
            total += 2 * 9 * stream * width + 2 * width + 2 * stream
        before = stream
    return total + 512 * num_classes + num_classes


@pytest.mark.parametrize(
    "s, widths, parameters",
    [
        (1, (64, 64, 128, 128, 256, 256, 512, 512), 14_144_676),
        (1 / 4, (16, 16, 32, 32, 64, 64, 128, 128), 4_741_476),
        (1 / 64, (1, 1, 2, 2, 4, 4, 8, 8), 1_802_976),
    ],
)
def test_resnet18_has_the_sizes_of_table_3(s, widths, parameters):
    assert inner_widths(s) == widths
    variables = shapes(ResNet18(widths, num_classes=100), IMAGE32, train=False)
    assert count(variables["params"]) == parameters == resnet_parameters(list(widths), 100)


def test_resnet18_layers_are_those_of_table_3():
    model = ResNet18(inner_widths(1 / 64), num_classes=100)
    _, state = jax.eval_shape(
        lambda key: model.init_with_output(key, IMAGE32, train=False, capture_intermediates=True, mutable=True),
        jax.random.key(0),
    )
    maps = {name: layer["__call__"][0].shape[1:] for name, layer in state["intermediates"].items() if "conv" in name}
    sides = {1: 32, 2: 32, 3: 32, 4: 16, 5: 16, 6: 16, 7: 8, 8: 8, 9: 8, 10: 4, 11: 4, 12: 4}
    assert maps == {f"conv_{i}": (side, side, 64 * 32 // side) for i, side in sides.items()}
    kernels = [leaf.shape[:2] for leaf in jax.tree.leaves(state["params"]) if leaf.ndim == 4]
    assert kernels == [(3, 3)] * 20


def test_block_adds_two_normalised_convolutions_to_its_input():
    x = jax.random.normal(jax.random.key(1), (4, 5, 5, 3), jnp.float32)
    block = Block(width=2)

    @jax.jit
    def run(x):
        variables = block.init(jax.random.key(0), x, train=False)
        return variables, block.apply(variables, x, train=True, mutable=["batch_stats"])

    variables, (out, updates) = run(x)

    def conv_norm(x, kernel):  # nine shifted products, then the batch's own mean and variance
        height, width = x.shape[1:3]
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        a = sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3))
        return (a - a.mean((0, 1, 2))) / np.sqrt(a.var((0, 1, 2)) + 1e-5), a

    kernels = {name: np.asarray(variables["params"][name]["conv"]["kernel"], np.float64) for name in ("in", "out")}
    h, a = conv_norm(np.asarray(x, np.float64), kernels["in"])
    y, _ = conv_norm(np.maximum(h, 0), kernels["out"])
    np.testing.assert_allclose(out, np.maximum(x + y, 0), atol=1e-4)
    running = updates["batch_stats"]["in"]["norm"]
    np.testing.assert_allclose(running["mean"], 0.1 * a.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(running["var"], 0.9 + 0.1 * a.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.slow
def test_resnet18_learns_and_keeps_running_statistics():
    images = jax.random.normal(jax.random.key(1), (8, 8, 8, 1), jnp.float32)
    labels = jnp.arange(8) % 2
    model = ResNet18(inner_widths(1 / 64), num_classes=2)
    variables = model.init(jax.random.key(0), images, train=False)

    @jax.jit
    def step(variables):
        def loss_fn(params):
            logits, new = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), new

        (loss, new), gradient = jax.value_and_grad(loss_fn, has_aux=True)(variables["params"])
        return {"params": jax.tree.map(lambda p, g: p - 0.05 * g, variables["params"], gradient), **new}, loss

    losses = []
    for _ in range(8):
        new, loss = step(variables)
        losses.append(float(loss))
        moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), variables, new)
        variables = new
    assert all(jax.tree.leaves(moved))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("widths", [(1,) * 7, (1,) * 9])
def test_resnet18_refuses_another_number_of_blocks(widths):
    with pytest.raises(ValueError, match=f"`widths` must name the inner widths of 8 blocks; got {len(widths)}"):
        shapes(ResNet18(widths, num_classes=2), IMAGE32, train=False)


@pytest.mark.parametrize("s", [0, -1, 1 / 128, 0.3])
def test_inner_widths_refuses_broken_neurons(s):
    with pytest.raises(ValueError, match="multiple of 1/64"):
        inner_widths(s)


@pytest.mark.parametrize("stages, parameters", [(VGG11, 9_491_018), (VGG16, 14_986_698)])
def test_vgg_sizes(stages, parameters):
    variables = shapes(VGG(stages, num_classes=10), IMAGE32, train=False)
    by_hand, before = 0, 3
    for width in [width for stage in stages for width in stage]:
        by_hand += 9 * before * width + 2 * width
        before = width
    by_hand += (512 + 1) * 512 + (512 + 1) * 10
    assert count(variables["params"]) == parameters == by_hand


@pytest.mark.parametrize("side, channels", [(28, 1), (8, 1), (32, 3)])
def test_vgg_takes_small_images_and_free_widths(side, channels):
    model = VGG(stages=((3,), (2,), (5, 4), (3, 2), (2, 6)), num_classes=4, dense=(7,))
    images = jnp.ones((2, side, side, channels), jnp.float32)
    logits, variables = jax.eval_shape(lambda key: model.init_with_output(key, images, train=False), jax.random.key(0))
    assert logits.shape == (2, 4)
    assert variables["params"]["conv_5_2"]["conv"]["kernel"].shape == (3, 3, 2, 6)
    assert variables["params"]["dense_1"]["kernel"].shape == (6, 7)


def test_mlp_is_dense_layers():
    model = MLP(widths=(5, 3), num_classes=2, activation=jnp.tanh)
    x = jax.random.normal(jax.random.key(1), (4, 2, 3, 1), jnp.float32)
    logits, variables = model.init_with_output(jax.random.key(0), x)
    params = jax.tree.map(np.asarray, variables["params"])
    h = np.asarray(x).reshape(4, 6)
    for name in ("hidden_1", "hidden_2"):
        h = np.tanh(h @ params[name]["kernel"] + params[name]["bias"])
    np.testing.assert_allclose(logits, h @ params["logits"]["kernel"] + params["logits"]["bias"], rtol=1e-5, atol=1e-6)
    assert count(params) == 6 * 5 + 5 + 5 * 3 + 3 + 3 * 2 + 2


# --- norms over a part of an axis ---

LIVE = np.array([0, 1, 3, 4, 6])
CAPACITY = 8


def spread(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Puts the slots of `values` at the live places of a capacity of zeros."""
    shape = list(values.shape)
    shape[axis] = CAPACITY
    out = np.zeros(shape, values.dtype)
    np.moveaxis(out, axis, -1)[..., LIVE] = np.moveaxis(values, axis, -1)
    return out


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape)


def test_layer_norm_is_that_of_the_counted_slots():
    x, scale, shift = draw(6, 3, 5), draw(5), draw(5) + 1
    expected = np.empty_like(x)
    for i in np.ndindex(6, 3):
        mean = sum(x[i]) / 5
        variance = sum((value - mean) ** 2 for value in x[i]) / 5
        expected[i] = (x[i] - mean) / np.sqrt(variance + 1e-3) * scale + shift
    out = width_layer_norm(*map(jnp.asarray, map(spread, (x, scale, shift, np.ones(5)))), 1e-3)
    np.testing.assert_allclose(out, spread(expected), atol=1e-12)


def test_rms_norm_is_that_of_the_counted_slots():
    x, scale = draw(6, 3, 5), draw(5)
    expected = np.empty_like(x)
    for i in np.ndindex(6, 3):
        expected[i] = x[i] / np.sqrt(sum(value**2 for value in x[i]) / 5 + 1e-3) * scale
    out = width_rms_norm(*map(jnp.asarray, map(spread, (x, scale, np.ones(5)))), 1e-3)
    np.testing.assert_allclose(out, spread(expected), atol=1e-12)


def test_what_is_not_counted_is_divided_by_the_others_and_not_centred():
    x, counted = jnp.asarray(draw(6, 5)), jnp.array([1.0, 0, 1, 1, 0])
    seen = x[:, np.asarray(counted) == 1]
    mean, std = seen.mean(1, keepdims=True), seen.std(1, keepdims=True)
    expected = np.where(counted, x - mean, x) / std * 2 + 3
    out = width_layer_norm(x, jnp.full(5, 2.0), jnp.full(5, 3.0), counted, 0.0)
    np.testing.assert_allclose(out, expected, rtol=1e-12)
    out = width_rms_norm(x, jnp.full(5, 2.0), counted, 0.0)
    np.testing.assert_allclose(out, 2 * x / np.sqrt((seen**2).mean(1, keepdims=True)), rtol=1e-12)


@pytest.mark.parametrize("width", [4, 5, 6])
def test_group_norm_is_that_of_the_live_channels(width):
    x, scale, shift = draw(3, 4, 4, width), draw(width), draw(width) + 1
    expected = np.empty_like(x)
    for i in range(3):
        for start in range(0, width, 2):
            group = x[i, :, :, start : start + 2]
            normalised = (group - group.mean()) / np.sqrt(((group - group.mean()) ** 2).mean() + 1e-3)
            channels = slice(start, start + 2)
            expected[i, :, :, channels] = normalised * scale[channels] + shift[channels]

    def pad(values):
        return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, 7 - width)])

    out = width_group_norm(*map(jnp.asarray, (pad(x), pad(scale), pad(shift))), 1e-3, group_size=2)
    np.testing.assert_allclose(out, pad(expected), atol=1e-12)


@pytest.mark.parametrize(
    "drop_in, flax",
    [
        (WidthLayerNorm(), nn.LayerNorm()),
        (WidthRMSNorm(), nn.RMSNorm()),
        (WidthGroupNorm(group_size=4), nn.GroupNorm(num_groups=None, group_size=4)),
    ],
    ids=["layer", "rms", "group"],
)
def test_a_full_norm_is_flax_own(drop_in, flax):
    x = jnp.asarray(draw(3, 5, 8), jnp.float32)
    ours, variables = drop_in.init_with_output(jax.random.key(0), x)
    theirs, expected = flax.init_with_output(jax.random.key(0), x)
    counted = variables["params"].pop("counted", jnp.ones(8))
    np.testing.assert_array_equal(counted, np.ones(8))
    assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, expected)
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, theirs, atol=3e-6)


def test_group_norm_refuses_empty_groups():
    with pytest.raises(ValueError, match="`group_size` must be at least 1; got 0"):
        WidthGroupNorm(group_size=0).init(jax.random.key(0), jnp.ones((2, 4)))


class Net(nn.Module):
    width: int
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.width, name="in")(x)
        x = jnp.tanh(self.norm(name="norm")(x))
        x = UnitDropout(0.4)(x, deterministic=False)
        return nn.Dense(3, name="out")(x)


def pad_net(params: dict) -> dict:
    def pad(path, leaf):
        layer = path[0].key
        if layer == "out":
            return leaf if leaf.ndim == 1 else np.pad(leaf, ((0, 3), (0, 0)))
        return np.pad(leaf, [(0, 0)] * (leaf.ndim - 1) + [(0, 3)])

    return jax.tree_util.tree_map_with_path(pad, params)


@pytest.mark.parametrize(
    "norm", [WidthLayerNorm, WidthRMSNorm, partial(WidthGroupNorm, group_size=2)], ids=["layer", "rms", "group"]
)
def test_padded_net_trains_as_the_exact_one(norm):
    x, y = draw(32, 4), draw(32, 3)
    optimizer = optax.adamw(1e-2)

    def train(width: int, params):
        @jax.jit
        def run(params):
            def loss_fn(params, key):
                out = Net(width, norm).apply({"params": params}, x, rngs={"dropout": key})
                return jnp.mean((out - y) ** 2)

            def step(carry, key):
                params, state = carry
                gradient = jax.grad(loss_fn)(params, key)
                updates, state = optimizer.update(gradient, state, params)
                return (optax.apply_updates(params, updates), state), None

            return jax.lax.scan(step, (params, optimizer.init(params)), jax.random.split(jax.random.key(7), 50))[0][0]

        return run(params)

    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    start = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), Net(5, norm).init(rngs, x)["params"])
    exact, padded = train(5, start), train(8, pad_net(start))
    moved = named_leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), start, exact))
    assert min(change for name, change in moved.items() if "counted" not in name) > 1e-2
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), pad_net(exact), padded)
    for leaf in (padded["in"]["kernel"][:, 5:], padded["norm"]["scale"][5:], padded["out"]["kernel"][5:]):
        assert not np.any(leaf)


# --- dropout by unit ---


def test_unit_dropout_draws_do_not_depend_on_the_width():
    x = jnp.ones((50, 6), jnp.float32)
    wide = unit_dropout(jax.random.key(0), x, 0.3)
    np.testing.assert_array_equal(unit_dropout(jax.random.key(0), x[:, :4], 0.3), wide[:, :4])
    assert wide.dtype == jnp.float32
    assert not np.array_equal(wide[:, 0], wide[:, 1])


def test_unit_dropout_keeps_the_mean_and_drops_the_rate():
    out = np.asarray(unit_dropout(jax.random.key(3), jnp.ones((2000, 10)), 0.25))
    dropped = (out == 0).mean()
    assert abs(dropped - 0.25) < 4 * np.sqrt(0.25 * 0.75 / out.size)
    np.testing.assert_allclose(out[out != 0], 1 / 0.75)


def test_unit_dropout_layer_is_the_identity_when_deterministic():
    x = jnp.asarray(draw(4, 6))
    np.testing.assert_array_equal(UnitDropout(0.5).apply({}, x, deterministic=True), x)
    with pytest.raises(ValueError, match=r"`rate` must be in \[0, 1\); got 1.0"):
        UnitDropout(1.0).apply({}, x, deterministic=True)
