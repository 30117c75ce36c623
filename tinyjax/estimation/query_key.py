"""The sums of queries and keys: V_goal is taken at their scores."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import producers_have_bias
from tinyjax.core.slots import any_besides
from tinyjax.discovery.kinds.query_key import QueryKeyPath
from tinyjax.estimation.attention_values import in_present_heads
from tinyjax.estimation.rows import captured_inputs, captured_matrix
from tinyjax.estimation.summation import SitePass, Summation
from tinyjax.estimation.tangents import carry
from tinyjax.statistics.dense import with_constant
from tinyjax.statistics.query_key import score_sums
from tinyjax.statistics.sums import Sums


def _sums(at: SitePass, path: QueryKeyPath) -> Sums:
    (scores,), found, recorded = path.consumers, path.attention, at.captured.inputs
    x = captured_inputs(path.producer, at.captured)
    y = captured_inputs(path.projected, at.captured)
    x = carry(path.queries, with_constant(x, producers_have_bias(at.site)), recorded)
    sums = score_sums(
        path.sizes,
        path.repeated,
        x,
        carry(path.keys, y, recorded),
        captured_inputs(scores, at.captured),
        -at.num_samples * captured_matrix(scores.outputs, at.captured.gradients[scores.op.path])[..., 0],
        None if found is None else captured_matrix(found.layout, recorded[found.address])[..., 0],
    )
    if _heads_are_layers(at, path):
        return sums
    return jax.tree.map(lambda x: jnp.squeeze(x, len(path.projected.op.stack)), sums)  # one key for all heads


def _heads_are_layers(at: SitePass, path: QueryKeyPath) -> bool:
    return len(at.site.stack) > len(path.projected.op.stack)


def _finish(at: SitePass, total: Sums, weight_prev: Array, weight: Array) -> tuple[Sums, dict[str, Any]]:
    """Empty heads, which are layers, are left out; the halves of the samples are behind them."""
    (path,), depth = at.paths, len(at.site.stack)
    assert isinstance(path, QueryKeyPath)
    if not _heads_are_layers(at, path):
        return total, {}
    present = any_besides(weight_prev, depth - 1) | any_besides(weight, depth - 1)
    kept = (present | ~jnp.any(present))[:, None, None]
    return in_present_heads(total, kept, offsets=(None,)), {}


SUMMATION = Summation(_sums, finish=_finish)
