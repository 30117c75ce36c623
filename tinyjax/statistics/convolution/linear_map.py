"""The move of a convolution under an update of its kernel."""

from collections.abc import Sequence

from jaxtyping import Array

from tinyjax.core.windows import Window, convolve, num_offsets, out_shape, pool_mean


def linear_move(
    x: Array,
    alpha: Array,
    omega: Array,
    producer: Window,
    consumer: Window,
    *,
    bias_prev: bool,
    between: Sequence[Window] = (),
) -> Array:
    """V(theta): the first-order move of the consumer's output when channels (alpha, omega) are added.

    Args:
        x: (n, *space0, C_in) input of the producer.
        alpha: (D, k) fan-in, bias row last iff `bias_prev`.
        omega: (k, M * O) fan-out, columns (output, offset).
        producer: geometry of the producer.
        consumer: geometry of the consumer.
        bias_prev: whether the producer has a bias.
        between: poolings between the two.

    Returns:
        (n, *space2, M).
    """
    channels = convolve(x, alpha[:-1], producer) + alpha[-1] if bias_prev else convolve(x, alpha, producer)
    for window in between:
        channels = pool_mean(channels, window)
    offsets = num_offsets(consumer)
    fan_out = omega.reshape(len(omega), -1, offsets).transpose(2, 0, 1)  # rows of a patch are (offset, channel)
    return convolve(channels, fan_out.reshape(offsets * len(omega), -1), consumer)


def require_shapes(x: Array, h: Array, v: Array, producer: Window, between: Sequence[Window], consumer: Window) -> None:
    """Raises a ValueError unless images, windows and V_goal are of sizes that fit each other."""
    space = out_shape(x.shape[1:-1], producer)
    for window in between:
        space = out_shape(space, window)
    if h.shape[1:-1] != space:
        raise ValueError(f"`h` has shape {h.shape}; the producer and the poolings give images of shape {space}")
    out = out_shape(space, consumer)
    if v.shape[1:-1] != out:
        raise ValueError(f"`v` has shape {v.shape}; the consumer gives images of shape {out}")
    if not len(x) == len(h) == len(v) or not len(x):
        raise ValueError(f"`x`, `h`, `v` must have the same samples, at least one; got {len(x)}, {len(h)}, {len(v)}")
