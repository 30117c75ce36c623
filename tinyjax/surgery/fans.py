"""Fan-ins and fan-outs of new neurons in the shapes of the leaves."""

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import cols, have_bias, is_normed, readers, rows
from tinyjax.core.layout import Layout
from tinyjax.core.site import Kernel, Site


def shares(site: Site, amplitude: Array) -> tuple[Array, Array]:
    """What fan-in and fan-out are multiplied by."""
    if is_normed(site):
        return amplitude, (amplitude > 0).astype(amplitude.dtype)
    root = jnp.sqrt(amplitude)
    return root, root


def nonzero_slots(x: Array, slot_axis: int) -> Array:
    """Which slots hold anything but zeros: any over all axes but one."""
    x = jnp.moveaxis(x, slot_axis, 0)
    return jnp.any(x.reshape(x.shape[0], -1) != 0, axis=1)


def paste(layout: Layout, leaf: Array, matrix: Array, mask: Array) -> Array:
    """The leaf with the entries of `matrix` where `mask` (broadcast against the matrix) holds."""
    return layout.from_matrix(jnp.where(mask, matrix.astype(leaf.dtype), layout.to_matrix(leaf)))


def fan_out_size(kernel: Kernel) -> int:
    """Columns of omega that belong to a consumer: outputs times kernel offsets."""
    slot = kernel.layout.slot
    assert slot is not None
    return rows(kernel) // kernel.layout.factors[slot] * cols(kernel)


def fan_out_matrix(layout: Layout, omega: Array) -> Array:
    """Fan-out `(*stack, C, M * offsets)`, columns (output, offset), as the consumer's matrix `(*stack, H, M)`."""
    stack = len(layout.stack)
    offsets = [f for f in layout.rows if f != layout.slot]
    num_outputs = omega.shape[-1]
    for f in offsets:
        num_outputs //= layout.factors[f]
    x = omega.reshape(*omega.shape[:-1], num_outputs, *(layout.factors[f] for f in offsets))
    # the axes are now (*stack, slot, output, *offsets); bring them into the order of the rows, outputs last
    order = [stack if f == layout.slot else stack + 2 + offsets.index(f) for f in layout.rows]
    x = x.transpose(*range(stack), *order, stack + 1)
    return x.reshape(*omega.shape[:stack], -1, num_outputs)


def slot_rows(layout: Layout, mask: Array) -> Array:
    """A mask over slots as a mask over the rows of the consumer's matrix, `(H, 1)`."""
    sizes = [layout.factors[f] for f in layout.rows]
    along = [-1 if f == layout.slot else 1 for f in layout.rows]
    return jnp.broadcast_to(mask.reshape(along), sizes).reshape(-1, 1)


def update_shape(site: Site) -> tuple[int, ...]:
    """Shape of an update of the consumers, `(*stack, H, M)`."""
    hidden = sum(rows(group[0]) + have_bias(group) for group in readers(site))
    return (*site.stack, hidden, sum(cols(kernel) for kernel in site.consumers))


def lead(producer: Kernel) -> tuple[int, ...]:
    """Layers of a stack, and heads: for each of them a slot has a fan-in of its own."""
    return tuple(producer.layout.factors[f] for f in producer.layout.stack)
