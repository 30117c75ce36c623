"""LayerNorm, RMSNorm and GroupNorm over an axis of which only a part is used.

Statistics run over the *counted* slots only, so a layer of capacity 64 with 40 neurons computes what a layer of width
40 computes. For LayerNorm and RMSNorm a vector beside the scale says which slots are counted: where it is not zero. It
is 1 everywhere at first, which makes a full layer the ordinary normalisation, and no gradient reaches it.

A neuron born by growth is not counted, and that is what makes growing possible here. One more term in a mean or in a
mean square changes every other neuron of the layer, however small the newborn and whatever its fan-out: no birth could
keep the function. A neuron that is not counted is divided by the root mean square of the counted ones and not centred:
it is silent at fan-in zero, linear in its fan-in, and nobody else notices it. Set its entry of `counted` to 1 to make
it an ordinary neuron of the norm; the loss jumps there, so do it while training has time to follow.

`find_sites` accepts RMSNorm and LayerNorm between two matrix products, not between convolutions. It refuses GroupNorm:
a newborn channel either changes its group's statistics or, alone in it, is rescaled whatever its fan-in. BatchNorm
grows everywhere.

The pieces are jitted under names of their own, by which discovery knows them in a jaxpr.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def width_layer_norm(
    x: Float[Array, "*rows c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    counted: Float[Array, " c"],
    epsilon: float | Array = 1e-6,
) -> Float[Array, "*rows c"]:
    """LayerNorm by the statistics of the counted slots of the last axis.

    y = scale (x - mean) / sqrt(var + epsilon) + shift in counted slots, scale x / sqrt(var + epsilon) + shift in the
    others; mean and variance are over the counted slots.

    Args:
        x: any leading axes, then the slots.
        scale: multiplies.
        shift: is added.
        counted: not zero where a slot is counted.
        epsilon: added to the variance.

    Example:
        >>> x, one = jnp.asarray([[1.0, 3.0, 9.0]]), jnp.ones(3)
        >>> y = models.width_layer_norm(x, one, 0 * one, jnp.asarray([1.0, 1.0, 0.0]))
        >>> print(y.round(2))  # the third slot is not counted
        [[-1.  1.  9.]]
    """
    centred = tinyjax_centred(x, counted)
    return centred * tinyjax_inverse_rms(centred, counted, epsilon) * scale + shift


def width_rms_norm(
    x: Float[Array, "*rows c"], scale: Float[Array, " c"], counted: Float[Array, " c"], epsilon: float | Array = 1e-6
) -> Float[Array, "*rows c"]:
    """RMSNorm by the mean square of the counted slots of the last axis.

    y = scale x / sqrt(mean(x^2) + epsilon), the mean over the counted slots.

    Args:
        x: any leading axes, then the slots.
        scale: multiplies.
        counted: not zero where a slot is counted.
        epsilon: added to the mean square.

    Example:
        >>> x, one = jnp.asarray([[1.0, 7.0, 9.0]]), jnp.ones(3)
        >>> y = models.width_rms_norm(x, one, jnp.asarray([1.0, 1.0, 0.0]))
        >>> print(y.round(1))  # the third slot is not counted
        [[0.2 1.4 1.8]]
    """
    return x * tinyjax_inverse_rms(x, counted, epsilon) * scale


@jax.jit
def tinyjax_centred(x: Float[Array, "*rows c"], counted: Float[Array, " c"]) -> Float[Array, "*rows c"]:
    """`x` minus, in counted slots, the mean of the counted slots."""
    return x - jnp.where(counted != 0, _mean(x, counted != 0, (-1,)), 0)


@jax.jit
def tinyjax_inverse_rms(
    x: Float[Array, "*rows c"], counted: Float[Array, " c"], epsilon: float | Array
) -> Float[Array, "*rows 1"]:
    """1 / sqrt(mean(x^2) + epsilon), the mean over the counted slots."""
    return jax.lax.rsqrt(_mean(x**2, counted != 0, (-1,)) + epsilon)


def width_group_norm(
    x: Float[Array, "n *space c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    epsilon: float | Array = 1e-6,
    *,
    group_size: int,
) -> Float[Array, "n *space c"]:
    """GroupNorm with groups of a fixed *size*, so that more channels make more groups and leave the old ones alone.

    Channel j belongs to group j // group_size; statistics run over all pixels and the live channels of a group, those
    whose scale is not zero; a dead channel gives zero. The last group may be incomplete.

    Args:
        x: samples, any number of space axes, channels.
        scale: zero in dead channels.
        shift: counts in live channels only.
        epsilon: added to the variance.
        group_size: channels a group.

    Example:
        >>> x, one = jnp.asarray([[1.0, 3.0, 9.0]]), jnp.ones(3)
        >>> y = models.width_group_norm(x, one, 0 * one, group_size=2)
        >>> print(y.round(2))
        [[-1.  1.  0.]]
    """
    return tinyjax_group_norm(x, scale, shift, epsilon, group_size=group_size)


@jax.jit(static_argnames="group_size")
def tinyjax_group_norm(
    x: Float[Array, "n *space c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    epsilon: float | Array,
    *,
    group_size: int,
) -> Float[Array, "n *space c"]:
    """`width_group_norm`, under the name by which discovery knows it in a jaxpr."""
    capacity = x.shape[-1]
    fill = -capacity % group_size
    live = scale != 0

    def grouped(values: Array) -> Array:
        padded = jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, fill)])
        return padded.reshape(*values.shape[:-1], -1, group_size)

    groups, live_groups = grouped(x), grouped(live)
    axes = (*range(1, x.ndim - 1), x.ndim)  # all but samples and groups
    centred = groups - _mean(groups, live_groups, axes)
    normalised = centred * jax.lax.rsqrt(_mean(centred**2, live_groups, axes) + epsilon)
    return jnp.where(live, normalised.reshape(*x.shape[:-1], -1)[..., :capacity] * scale + shift, 0)


class WidthLayerNorm(nn.Module):
    """`width_layer_norm` as a layer, in the place of `nn.LayerNorm`; its parameters are `scale`, `bias` and `counted`.

    Example:
        >>> layer = models.WidthLayerNorm()
        >>> variables = layer.init(key, jnp.ones((2, 12)))

    Attributes:
        epsilon: added to the variance.
        scale_init: initialiser of the scale.
        param_dtype: of the parameters.
    """

    epsilon: float = 1e-6
    scale_init: Callable[..., Array] = nn.initializers.ones
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
        """Normalises the last axis by its counted slots."""
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        shift = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return width_layer_norm(x, scale, shift, _counted(self, x), self.epsilon)


class WidthRMSNorm(nn.Module):
    """`width_rms_norm` as a layer, in the place of `nn.RMSNorm`; its parameters are `scale` and `counted`.

    Example:
        >>> layer = models.WidthRMSNorm()
        >>> variables = layer.init(key, jnp.ones((2, 12)))

    Attributes:
        epsilon: added to the mean square.
        scale_init: initialiser of the scale.
        param_dtype: of the parameters.
    """

    epsilon: float = 1e-6
    scale_init: Callable[..., Array] = nn.initializers.ones
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"]) -> Float[Array, "*rows c"]:
        """Normalises the last axis by its counted slots."""
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        return width_rms_norm(x, scale, _counted(self, x), self.epsilon)


class WidthGroupNorm(nn.Module):
    """`width_group_norm` as a layer, in the place of `nn.GroupNorm(num_groups=None, group_size=...)`.

    Example:
        >>> layer = models.WidthGroupNorm(group_size=4)
        >>> variables = layer.init(key, jnp.ones((2, 12)))

    Attributes:
        group_size: channels a group.
        epsilon: added to the variance.
        scale_init: initialiser of the scale.
        param_dtype: of the parameters.
    """

    group_size: int
    epsilon: float = 1e-6
    scale_init: Callable[..., Array] = nn.initializers.ones
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "n *space c"]) -> Float[Array, "n *space c"]:
        """Normalises the live channels, group by group."""
        if self.group_size < 1:
            raise ValueError(f"`group_size` must be at least 1; got {self.group_size}")
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        shift = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return width_group_norm(x, scale, shift, self.epsilon, group_size=self.group_size)


def _counted(module: nn.Module, x: Array) -> Array:
    return module.param("counted", nn.initializers.ones, x.shape[-1:], jnp.float32)


def _mean(x: Array, live: Bool[Array, "..."], axes: tuple[int, ...]) -> Array:
    """Mean over the live entries along `axes` (kept); 0 where none is live."""
    mask = jnp.broadcast_to(live, x.shape)
    count = mask.sum(axes, keepdims=True, dtype=x.dtype)
    return jnp.where(mask, x, 0).sum(axes, keepdims=True) / jnp.maximum(count, 1)
