"""The standard augmentation of small images: pad, crop at random, flip at random."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key


def epoch_key(seed: int, epoch: int) -> Key[Array, ""]:
    """The key of all draws of one epoch; fold the number of the batch in for each of its batches.

    Example:
        >>> key = jax.random.fold_in(data.epoch_key(seed=0, epoch=3), 7)
    """
    return jax.random.fold_in(jax.random.key(seed), epoch)


@functools.partial(jax.jit, static_argnames="padding")
def augment(
    key: Key[Array, ""], images: Float[Array, "n height width channels"], *, padding: int = 4
) -> Float[Array, "n height width channels"]:
    """Crops every image at random after padding it with zeros on all sides, and mirrors half of the images.

    The padding is zero in *standardised* units, the mean pixel.

    Example:
        >>> key = jax.random.fold_in(data.epoch_key(seed=0, epoch=3), 7)
        >>> data.augment(key, images, padding=1).shape
        (64, 2, 2, 1)

    Args:
        key: typed PRNG key, see `epoch_key`.
        images: (n, height, width, channels).
        padding: pixels on each side, static.

    Returns:
        Images of the same shape and dtype.
    """
    shift_key, flip_key = jax.random.split(key)
    num_images, *shape = images.shape
    corners = jax.random.randint(shift_key, (num_images, 2), 0, 2 * padding + 1)
    flips = jax.random.bernoulli(flip_key, shape=(num_images, 1, 1, 1))
    padded = jnp.pad(images, ((0, 0), (padding, padding), (padding, padding), (0, 0)))

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), shape)

    crops = jax.vmap(crop)(padded, corners)
    return jnp.where(flips, crops[:, :, ::-1], crops)
