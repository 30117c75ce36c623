"""LayerNorm, RMSNorm and GroupNorm over an axis of which only a part is used.

A slot is *live* iff its scale is not zero. Statistics run over the live slots only and a dead slot gives exactly zero,
so a layer of capacity 64 with 40 live slots computes what a layer of width 40 computes, and empty slots stay empty
under training: their scale and shift receive no gradient where nothing reads them. A neuron with scale zero is a dead
one: start scales away from zero.

The functions are jitted under their own names, so that each stays one recognisable call in a jaxpr.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@jax.jit
def width_layer_norm(
    x: Float[Array, "*rows c"], scale: Float[Array, " c"], shift: Float[Array, " c"], epsilon: float | Array = 1e-6
) -> Float[Array, "*rows c"]:
    """LayerNorm over the live slots of the last axis.

    y = scale (x - mean) / sqrt(var + epsilon) + shift, mean and variance over the slots whose scale is not zero.

    Args:
        x: any leading axes, then the slots.
        scale: zero in dead slots.
        shift: counts in live slots only.
        epsilon: added to the variance.
    """
    live = scale != 0
    centred = x - _mean(x, live, (-1,))
    return jnp.where(live, centred * jax.lax.rsqrt(_mean(centred**2, live, (-1,)) + epsilon) * scale + shift, 0)


@jax.jit
def width_rms_norm(
    x: Float[Array, "*rows c"], scale: Float[Array, " c"], epsilon: float | Array = 1e-6
) -> Float[Array, "*rows c"]:
    """RMSNorm over the live slots of the last axis: the mean square is divided by the live width, not the capacity.

    y = scale x / sqrt(mean(x^2) + epsilon), the mean over the slots whose scale is not zero.

    Args:
        x: any leading axes, then the slots.
        scale: zero in dead slots.
        epsilon: added to the mean square.
    """
    live = scale != 0
    return x * jax.lax.rsqrt(_mean(x**2, live, (-1,)) + epsilon) * scale


@jax.jit(static_argnames="group_size")
def width_group_norm(
    x: Float[Array, "n *space c"],
    scale: Float[Array, " c"],
    shift: Float[Array, " c"],
    epsilon: float | Array = 1e-6,
    *,
    group_size: int,
) -> Float[Array, "n *space c"]:
    """GroupNorm with groups of a fixed *size*, so that more channels make more groups and leave the old ones alone.

    Channel j belongs to group j // group_size; statistics run over all pixels and the live channels of a group. The
    last group may be incomplete.

    Args:
        x: samples, any number of space axes, channels.
        scale: zero in dead channels.
        shift: counts in live channels only.
        epsilon: added to the variance.
        group_size: channels a group.
    """
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
    """`width_layer_norm` as a layer, in the place of `nn.LayerNorm`.

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
        """Normalises the live slots of the last axis."""
        scale = self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype)
        shift = self.param("bias", nn.initializers.zeros, x.shape[-1:], self.param_dtype)
        return width_layer_norm(x, scale, shift, self.epsilon)


class WidthRMSNorm(nn.Module):
    """`width_rms_norm` as a layer, in the place of `nn.RMSNorm`.

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
        """Normalises the live slots of the last axis."""
        return width_rms_norm(x, self.param("scale", self.scale_init, x.shape[-1:], self.param_dtype), self.epsilon)


class WidthGroupNorm(nn.Module):
    """`width_group_norm` as a layer, in the place of `nn.GroupNorm(num_groups=None, group_size=...)`.

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


def _mean(x: Array, live: Bool[Array, "..."], axes: tuple[int, ...]) -> Array:
    """Mean over the live entries along `axes` (kept); 0 where none is live."""
    mask = jnp.broadcast_to(live, x.shape)
    count = mask.sum(axes, keepdims=True, dtype=x.dtype)
    return jnp.where(mask, x, 0).sum(axes, keepdims=True) / jnp.maximum(count, 1)
