"""Images and sequences: what is found, what is refused and why, and by brute force that what is growable really is."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax import lax

from tests.support.brute_force import inspect
from tests.support.zoo import images
from tests.support.zoo.layers import data, draw
from tinyjax.discovery.sites import find_sites
from tinyjax.models.dropout import unit_dropout
from tinyjax.models.norms import WidthGroupNorm, WidthLayerNorm, WidthRMSNorm

MODELS = images.IMAGES | images.NORMALISED | images.KINKED


@pytest.mark.parametrize("name", MODELS)
def test_growable(name):
    """Names and capacities; a neuron is written and the gradient compared; the slope where it is not a mean slope."""
    model = MODELS[name]()
    sites = find_sites(model.loss_fn, model.params, model.batch, has_aux=model.has_aux)
    assert {site.name: site.capacity for site in sites.growable} == dict(model.growable)
    for site in sites.growable:
        assert (site.norm is not None) == (name in images.NORMALISED), site
    for report in inspect(model).values():
        assert report.silent_out == report.silent_in == report.untouched == report.dust == 0, report
        assert report.identity < 1e-12, report
        assert name not in images.IMAGES or report.slope < 1e-6, report


@pytest.mark.parametrize(
    ("pool", "count"),
    [
        (lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID").mean((1, 2)), 4.0),
        (lambda h: h.sum((1, 2)), 24.0),
    ],
)
def test_a_sum_over_pixels_counts_as_their_mean(pool, count):
    """Directions are the same; the first-order effect is larger by the number of pixels summed."""

    def apply(p, x):
        h = jnp.tanh(lax.conv_general_dilated(x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")))
        return pool(h) @ p["u"]

    model = images.Model(images.squares(apply), draw(k=(3, 3, 2, 3), u=(3, 2)), data(5, 4, 6, 2), {"k": 3})
    (report,) = inspect(model, slope=count).values()
    assert report.slope < 1e-6 and report.identity < 1e-12
    assert report.silent_out == report.silent_in == report.dust == 0


class Between(nn.Module):
    """Two convolutions and a head, with something in between."""

    between: object
    second: object = nn.Conv

    @nn.compact
    def __call__(self, x):
        x = self.between(nn.Conv(4, (3, 3), name="first")(x))
        return nn.Dense(2, name="head")(self.second(4, (3, 3), name="second")(x).mean((1, 2)))


def grouped(groups):
    return partial(nn.Conv, feature_group_count=groups)


def squeeze_excite(h):
    gate = nn.relu(nn.Dense(2, name="squeeze")(h.mean((1, 2))))
    return h * nn.tanh(nn.Dense(4, name="excite")(gate))[:, None, None]


def with_parameter(act):
    """Something that meets a vector of its own."""

    class Vector(nn.Module):
        @nn.compact
        def __call__(self, h):
            return act(h, self.param("s", nn.initializers.normal(), (4,)))

    return lambda h: Vector(name="vector")(h)


def miscounted(h):
    """Divided by the numbers of pixels in other windows."""
    counts = lax.reduce_window(jnp.ones((1, *h.shape[1:3], 1)), 0.0, lax.add, (1, 3, 1, 1), (1, 1, 1, 1), "SAME")
    return lax.reduce_window(h, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") / counts


REFUSED = {
    "group_norm": (lambda h: nn.tanh(nn.GroupNorm(2)(h)), "summary of themselves"),
    "instance_norm": (lambda h: nn.tanh(nn.InstanceNorm()(h)), "a part of its rows"),
    "layer_norm": (lambda h: nn.tanh(nn.LayerNorm()(h)), "mixed by `reduce_sum`"),
    "layer_norm_all": (lambda h: nn.tanh(nn.LayerNorm(reduction_axes=(1, 2, 3))(h)), "layer"),
    "rms_norm": (lambda h: nn.tanh(nn.RMSNorm()(h)), ""),
    "width_group_norm": (lambda h: nn.tanh(WidthGroupNorm(2)(h)), "`WidthGroupNorm` normalises it"),
    "width_layer_norm": (lambda h: nn.tanh(WidthLayerNorm()(h)), "between convolutions or poolings"),
    "width_rms_norm": (lambda h: nn.tanh(WidthRMSNorm()(h)), "between convolutions or poolings"),
    "batch_norm_no_scale": (lambda h: nn.BatchNorm(use_running_average=True, use_scale=False)(h), "one scale"),
    "batch_norm_no_shift": (lambda h: nn.BatchNorm(use_running_average=True, use_bias=False)(h), "one scale"),
    "batch_statistics_alone": (lambda h: (h - h.mean((0, 1, 2))) / (h.std((0, 1, 2)) + 1e-5), "not finite"),
    "batch_norm_twice": (lambda h: nn.BatchNorm(True)(nn.tanh(nn.BatchNorm(True)(h))), ""),
    "squeeze_excite": (squeeze_excite, "read different tensors"),
    "dropout": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), "random numbers"),
    "drop_channels": (lambda h: h * jax.random.bernoulli(jax.random.key(0), 0.5, (4,)), "random numbers"),
    "upsampled": (lambda h: jnp.repeat(h, 2, axis=1), "other pixels"),
    "resized": (lambda h: jax.image.resize(h, (5, 8, 8, 4), "nearest"), "mixed by"),
    "rolled": (lambda h: jnp.roll(h, 1, axis=1), "mixed by"),
    "flipped": (lambda h: h[:, ::-1], "mixed by"),
    "cropped": (lambda h: h[:, 1:], "mixed by"),
    "padded_by_ones": (
        lambda h: jnp.pad(h, ((0, 0), (1, 1), (0, 0), (0, 0)), constant_values=1.0), "mixed by `pad`"
    ),
    "padded_around": (lambda h: jnp.pad(h, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="wrap"), "mixed by"),
    "padded_channels": (lambda h: jnp.pad(h, ((0, 0), (0, 0), (0, 0), (0, 1)))[..., :4], "it passes through `pad`"),
    "dilated_by_padding": (
        lambda h: lax.pad(h, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))), "mixed by `pad`"
    ),
    "strided_mean": (
        lambda h: h.reshape(-1, 2, 2, 4, 4).mean(1), "outer factor of an axis of pixels",
    ),
    "swapped": (lambda h: h.swapaxes(1, 2), "other pixels"),
    "dilated_max_pool": (
        lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 1, 1, 1), "VALID", None, (1, 2, 2, 1)),
        "with dilation",
    ),
    "pool_over_channels": (
        lambda h: lax.reduce_window(h, 0.0, lax.add, (1, 1, 1, 3), (1, 1, 1, 1), "SAME"), "",
    ),
    "miscounted_average": (miscounted, "weighted one by one"),
    "centred": (lambda h: h - h.mean((0, 1, 2)), "centring"),
    "centred_pixels": (lambda h: h - h.mean((1, 2), keepdims=True), "centring"),
    "one_plus_scale": (with_parameter(lambda h, s: h * (1 + s)), "vector/s"),
    "exp_scale": (with_parameter(lambda h, s: h * jnp.exp(s)), "vector/s"),
    "squared_shift": (with_parameter(lambda h, s: h + s**2), "not silent"),
    "sigmoid": (nn.sigmoid, "maps 0 to 0.5"),
    "pixel_mask": (lambda h: h * jnp.linspace(0.5, 1.5, h.shape[1])[:, None, None], "weighted one by one"),
    "soft_pixels": (lambda h: jax.nn.softmax(h, axis=1), ""),
    "cumulative": (lambda h: jnp.cumsum(h, axis=1), "mixed by"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_between_convolutions(name):
    between, word = REFUSED[name]
    net, batch = Between(between), data(5, 4, 4, 2)
    variables = images.variables_of(net, batch)
    sites = find_sites(images.squares(net.apply), variables, batch)
    assert not sites["first"].growable and word in sites["first"].reason, sites["first"].reason
    assert len(sites["first"].reason) > 10
    assert sites["second"].growable


@pytest.mark.parametrize(
    ("second", "word"),
    [
        (partial(nn.Conv, feature_group_count=2), "grouped convolution"),
        (partial(nn.Conv, feature_group_count=4), "grouped convolution"),
        (partial(nn.ConvTranspose, strides=(2, 2)), "transposed convolution"),
    ],
    ids=["grouped", "depthwise", "transposed"],
)
def test_refused_convolutions(second, word):
    """On both of its sides."""
    net, batch = Between(nn.tanh, second), data(5, 4, 4, 2)
    sites = find_sites(images.squares(net.apply), images.variables_of(net, batch), batch)
    assert len(sites) and not sites.growable
    assert all(word in site.reason and len(site.reason) > 10 for site in sites), sites


def conv(x, k):
    return lax.conv(x, k, (1, 1), "SAME")


def shared(read):
    return lambda p, x: read(p, jnp.tanh(conv(x, p["k"]))).mean((2, 3))


def in_a_scan(p, x):
    """A residual stream of convolutions, scanned over layers."""

    def block(x, k):
        return x + conv(jnp.tanh(conv(x, k[0])), k[1]), None

    return lax.scan(block, x, (p["k"], p["u"]))[0].mean((2, 3)) @ p["head"]


def over_frames(p, x):
    def frame(_, x):
        return _, conv(jnp.tanh(conv(x, p["k"])), p["u"])

    return lax.scan(frame, 0.0, jnp.stack([x, 2 * x]))[1].mean((0, 3, 4))


def over_patches(p, x):
    """Samples and patches are merged into one batch: an axis of the batch is no axis of pixels."""
    x = x.reshape(x.shape[0] * 2, 1, *x.shape[2:])
    return conv(jnp.tanh(conv(x, p["k"])), p["u"]).mean((2, 3)).reshape(-1, 6)


KERNELS = dict(k=(3, 2, 3, 3), u=(3, 3, 3, 3), v=(3, 3, 1, 1), w=(3, 2))
ELSEWHERE = {
    "windows": (shared(lambda p, h: conv(h, p["u"]) + conv(h, p["v"])), KERNELS, "different windows"),
    "padding": (
        shared(lambda p, h: conv(h, p["u"]).sum((2, 3), keepdims=True) + lax.conv(h, p["u2"], (1, 1), "VALID")),
        KERNELS | dict(u2=(3, 3, 3, 3)),
        "different windows",
    ),
    "before_and_after_a_pool": (
        lambda p, x: shared(lambda p, h: conv(h, p["u"]))(p, x) + jnp.tanh(conv(x, p["k"])).mean((2, 3)) @ p["w"],
        KERNELS | dict(w=(3, 3)),
        "consumers",
    ),
    "pooled_and_not": (
        shared(lambda p, h: conv(h, p["u"]) + (h.mean((2, 3)) @ p["w"])[..., None, None]),
        KERNELS | dict(w=(3, 3)),
        "different tensors",
    ),
    "in_a_scan": (in_a_scan, dict(k=(3, 4, 2, 3, 3), u=(3, 2, 4, 3, 3), head=(2, 2)), "scan"),
    "over_frames": (over_frames, KERNELS, "scan"),
    "over_patches": (over_patches, KERNELS | dict(k=(3, 1, 3, 3)), "batch"),
    "half_of_the_pixels_as_rows": (
        lambda p, x: jnp.einsum("nchw,cho->nwo", jnp.tanh(conv(x, p["k"])), p["u"]),
        KERNELS | dict(u=(3, 4, 2)),
        "other rows",
    ),
    "fewer_axes": (
        lambda p, x: lax.conv_general_dilated(jnp.tanh(conv(x, p["k"])).mean(3), p["u"], (1,), "SAME"),
        KERNELS | dict(u=(3, 3, 2)),
        "other pixels",
    ),
    "tied": (lambda p, x: conv(jnp.tanh(conv(x, p["k"])), p["k"].swapaxes(0, 1)), KERNELS, "both writes and reads"),
    "normalised_kernel": (
        lambda p, x: conv(jnp.tanh(conv(x, p["k"] / jnp.linalg.norm(p["k"]))), p["u"]), KERNELS, "reaches the matrix",
    ),
    "both_sides_of_a_gate": (
        lambda p, x: conv(jnp.tanh(conv(x, p["k"])) * conv(x, p["g"]), p["u"]),
        KERNELS | dict(g=(3, 2, 3, 3)),
        "a gated unit between convolutions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ELSEWHERE)
def test_refused_readers(name):
    apply, shapes, word = ELSEWHERE[name]
    sites = find_sites(images.squares(apply), draw(**shapes), data(4, 2, 4, 4))
    assert not sites["k"].growable and word in sites["k"].reason, sites["k"].reason
    assert len(sites["k"].reason) > 10


def test_dropout_by_unit_grows_between_convolutions():
    def loss_fn(p, batch):
        h = jnp.moveaxis(conv(batch["x"], p["k"]), 1, -1)
        return jnp.mean(conv(jnp.moveaxis(unit_dropout(batch["key"], h, 0.5), -1, 1), p["u"]) ** 2)

    batch = data(4, 2, 4, 4) | {"key": jax.random.key(0)}
    assert find_sites(loss_fn, draw(**KERNELS), batch)["k"].growable
