"""From captured arrays to the matching rows of a path."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.layout import Layout
from tinyjax.core.params import Params
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.tracing import Trace
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.paths.row_factors import RowFactorLayout
from tinyjax.estimation.recording import Captured, capture
from tinyjax.estimation.summation import SitePass


class Rows(NamedTuple):
    """What one path captured, in matching rows.

    Attributes:
        x: (*stack, rows, D) input of the producer, without the constant.
        h: (*stack, rows, H) input of the consumers.
        v: (*stack, rows, M) V_goal, consumers side by side.
    """

    x: Array
    h: Array
    v: Array


def capture_paths(traced: Trace, params: Params, batch: Any, paths: Sequence[Path]) -> Captured:
    """What the rows of all these paths need, in one forward and one backward pass."""
    consumers = [consumer for path in paths for consumer in path.consumers]
    return capture(
        traced,
        jax.tree.leaves((params, batch)),
        _distinct([use for path in paths for use in path.recorded()] + consumers),
        _distinct(consumers),
        {address: operand for path in paths for address, operand in path.taps().items()},
    )


def _distinct(uses: Sequence[Product]) -> list[Product]:
    return list({use.op.path: use for use in uses}.values())


def path_rows(at: SitePass, path: Path) -> Rows:
    """The rows of one path, in float32 at least."""
    by_leaf = {consumer.leaf: consumer for consumer in path.consumers}
    x = captured_inputs(path.producer, at.captured)
    h = captured_inputs(path.consumers[0], at.captured)
    return Rows(x, h, goals([by_leaf[kernel.leaf] for kernel in at.site.consumers], at))


def goals(consumers: Sequence[Product], at: SitePass) -> Array:
    """(*stack, rows, M) V_goal of some consumers side by side, in float32 at least."""
    found = [captured_matrix(use.outputs, at.captured.gradients[use.op.path]) for use in consumers]
    return -at.num_samples * jnp.concatenate(found, axis=-1)


def row_weight(weights: Sequence[RowFactorLayout], captured: Captured, dtype: Any) -> Array | None:
    """(*stack, rows, 1) what the rows of the producer's input, and the constant beside it, are multiplied by."""
    columns = [weight.column(captured.inputs[weight.address]).astype(dtype) for weight in weights]
    return functools.reduce(jnp.multiply, columns) if columns else None


def captured_inputs(use: Product, captured: Captured) -> Array:
    """What a product reads as `(*stack, rows, cols)`, in float32 at least."""
    return captured_matrix(use.inputs, captured.inputs[use.op.path])


def captured_matrix(layout: Layout, array: Array) -> Array:
    """A captured array as `(*stack, rows, cols)`, in float32 at least."""
    return layout.to_matrix(array).astype(jnp.promote_types(array.dtype, jnp.float32))
