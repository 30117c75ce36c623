"""The sums of residual streams: what writers bring to each reader, and all readers side by side."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.discovery.kinds.embeddings import index_column, num_inputs
from tinyjax.discovery.kinds.residual_stream import Branch, StreamPath
from tinyjax.estimation.recording import Captured
from tinyjax.estimation.rows import captured_inputs, goals
from tinyjax.estimation.summation import SitePass, Summation
from tinyjax.estimation.tangents import carry
from tinyjax.statistics.dense import row_sums
from tinyjax.statistics.residual_stream import side_by_side
from tinyjax.statistics.sums import Sums


def _sums(at: SitePass, path: StreamPath) -> Sums:
    """The sums of the readers of one tensor."""
    h = captured_inputs(path.consumers[0], at.captured)
    return row_sums(
        stream_inputs(path.branches, at.captured, len(h), h.dtype),
        h,
        goals(path.consumers, at),
        at.num_samples,
        bias_prev=False,
        bias=all(c.bias is not None for c in path.consumers),
        extras=at.extras,
    )


def stream_inputs(branches: Sequence[Branch], captured: Captured, num_rows: int, dtype: jnp.dtype) -> Array:
    """What a reader sees of a new coordinate, for every input of every writer: (rows, D).

    Args:
        branches: the writers on their way to the reader.
        captured: what they write from, and what it is multiplied by.
        num_rows: of the reader.
        dtype: of the sums; a writer that comes after the reader brings zeros.
    """
    columns = []
    for branch in branches:
        if branch.tangent is None:
            columns.append(jnp.zeros((num_rows, num_inputs(branch.use)), dtype))
        else:
            columns.append(carry(branch.tangent, _features(branch, captured, dtype), captured.inputs)[:, 0, :])
    return jnp.concatenate([column.astype(dtype) for column in columns], axis=-1)


def _features(branch: Branch, captured: Captured, dtype: jnp.dtype) -> Array:
    """The inputs of a writer, the constant last iff it has a bias; rows of a table as one-hot rows."""
    use = branch.use
    if branch.rows is not None:
        return jax.nn.one_hot(jnp.array(branch.rows), num_inputs(use), dtype=dtype)
    x = use.inputs.to_matrix(captured.inputs[use.op.path])
    if branch.is_table:
        return jax.nn.one_hot(x[:, index_column(use.op)], num_inputs(use), dtype=dtype)
    x = x.astype(dtype)
    return x if use.bias is None else jnp.concatenate([x, jnp.ones((len(x), 1), dtype)], axis=-1)


def _join(at: SitePass, parts: Sequence[Sums]) -> tuple[Sums, dict[str, Any]]:
    """The sums of all readers side by side, and which columns are whose."""
    assert at.site.stream is not None
    sums, reads = side_by_side(parts)
    return sums, {"reads": reads, "normed": at.site.stream.normed}


SUMMATION = Summation(_sums, join=_join)
