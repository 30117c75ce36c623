"""The sums of attention values: tangents, whose rows are those of the consumers, head beside head."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import consumers_have_bias, producers_have_bias
from tinyjax.core.site import Site
from tinyjax.core.slots import any_besides
from tinyjax.discovery.kinds.attention_values import ValuesPath
from tinyjax.estimation.rows import path_rows
from tinyjax.estimation.summation import SitePass, Summation
from tinyjax.estimation.tangents import carry
from tinyjax.statistics.dense import tangent_sums, with_constant
from tinyjax.statistics.sums import Sums


def _sums(at: SitePass, path: ValuesPath) -> Sums:
    x, h, v = path_rows(at, path)
    recorded = {address: at.captured.inputs[address] for address in path.tangent.taps}
    return tangent_sums(
        carry(path.tangent, with_constant(x, producers_have_bias(at.site)), recorded),
        h,
        v,
        at.num_samples,
        heads=_num_heads(at.site),
        bias=consumers_have_bias(at.site),
        extras=at.extras,
    )


def _num_heads(site: Site) -> int | None:
    """How many heads the slots of a site come in, None without."""
    stack = site.producers[0].layout.stack[len(site.stack) :]
    return site.producers[0].layout.factors[stack[0]] if stack else None


def _finish(at: SitePass, total: Sums, weight_prev: Array, weight: Array) -> tuple[Sums, dict[str, Any]]:
    """Heads are side by side in the rows of S, N~ and P; empty ones are left out."""
    heads, depth = _num_heads(at.site), len(at.site.stack)
    if heads is None:
        return total, {}
    hidden = weight[..., : weight.shape[-2] - consumers_have_bias(at.site), :]
    present = any_besides(weight_prev, depth) | any_besides(hidden.reshape(*at.site.stack, heads, -1), depth)
    kept = jnp.repeat(present | ~jnp.any(present), total.gram_prev.shape[-1] // heads)
    return in_present_heads(total, kept, offsets=()), {"heads": heads}


def in_present_heads(total: Sums, kept: Array, offsets: tuple[None, ...]) -> Sums:
    """The sums without those of empty heads: a neuron in one would make it a head that attends uniformly for good.

    A head is empty that has no weights in the site's dimension while others have.

    Args:
        total: the sums.
        kept: which rows of S are in heads that are kept.
        offsets: an axis of `link` that `kept` does not have, where heads are layers.
    """
    assert total.link is not None
    each = kept[..., None]
    return dataclasses.replace(
        total,
        gram_prev=jnp.where(each & kept[..., None, :], total.gram_prev, 0),
        cross_prev=jnp.where(each, total.cross_prev, 0),
        link=jnp.where(each[(..., *offsets)], total.link, 0),
    )


SUMMATION = Summation(_sums, finish=_finish)
