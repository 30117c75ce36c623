"""Dropout whose draws belong to the unit, so that capacity does not change them.

Discovery accepts it on a dimension that grows: an empty slot gives zero whatever is drawn, a birth leaves the draws of
the other units alone, and the first-order effect of a newborn, averaged over its own draws, is the one without dropout.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def unit_dropout(key: Key[Array, ""], x: Float[Array, "*rows c"], rate: float | Array) -> Float[Array, "*rows c"]:
    """Dropout where unit j draws from `fold_in(key, j)`: its draws are the same whatever the width or capacity.

    `jax.random.bernoulli` over the whole array draws other values for the *same* unit as soon as another one is added.

    Args:
        key: typed PRNG key.
        x: any leading axes, then the units.
        rate: probability of dropping, in [0, 1).

    Example:
        >>> narrow, wide = (models.unit_dropout(key, jnp.ones((3, width)), 0.5) for width in (4, 8))
        >>> bool(jnp.all(narrow == wide[:, :4]))
        True
    """
    return tinyjax_unit_dropout(key, x, rate)


@jax.jit
def tinyjax_unit_dropout(
    key: Key[Array, ""], x: Float[Array, "*rows c"], rate: float | Array
) -> Float[Array, "*rows c"]:
    """`unit_dropout`, under the name by which discovery knows it in a jaxpr."""

    def keep(unit: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, unit), 1 - rate, x.shape[:-1])

    kept = jax.vmap(keep, out_axes=-1)(jnp.arange(x.shape[-1]))
    return jnp.where(kept, x / (1 - rate), 0)


class UnitDropout(nn.Module):
    """`unit_dropout` as a layer, in the place of `nn.Dropout`; draws from the `dropout` stream.

    Example:
        >>> layer = models.UnitDropout(rate=0.5)
        >>> dropped = layer.apply({}, jnp.ones((3, 4)), deterministic=False, rngs={"dropout": key})

    Attributes:
        rate: probability of dropping, in [0, 1).
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "*rows c"], *, deterministic: bool) -> Float[Array, "*rows c"]:
        """Drops units at random; the identity when `deterministic`."""
        if not 0 <= self.rate < 1:
            raise ValueError(f"`rate` must be in [0, 1); got {self.rate}")
        if deterministic or self.rate == 0:
            return x
        return unit_dropout(self.make_rng("dropout"), x, self.rate)
