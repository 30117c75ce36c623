"""Writing neurons into free slots, and emptying slots, without changing a shape.

A neuron is a column of the producer (with its bias) and rows of the consumers. `write` puts new ones into the free
slots of a site, inside `jit`, `scan` or `vmap`; `thin` empties slots so that a network allocated at full capacity
starts narrow. Both touch only the entries of the slots concerned.
"""

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool

from tinyjax.core.kernels import (
    cols,
    fan_in_size,
    gating_kernels,
    have_bias,
    num_inputs,
    readers,
    recurrent_leaves,
    require_growable,
    rows,
    site_leaves,
    writers,
)
from tinyjax.core.neurons import Neurons
from tinyjax.core.params import Params, replace_leaves
from tinyjax.core.site import Kernel, Site
from tinyjax.core.slots import NEUTRAL, free_slots
from tinyjax.surgery.attention_heads import whole_heads
from tinyjax.surgery.fans import (
    fan_out_matrix,
    fan_out_size,
    lead,
    nonzero_slots,
    paste,
    shares,
    slot_rows,
    update_shape,
)


def write(
    params: Params,
    site: Site,
    neurons: Neurons,
    *,
    amplitude: ArrayLike,
    delta: Array | None = None,
    limit: ArrayLike | None = None,
    birth: Mapping[str, ArrayLike] | None = None,
) -> tuple[Params, Bool[Array, " capacity"]]:
    r"""Writes neuron k into the k-th free slot and updates the consumers: $a \to a + \gamma (V(\theta) + V(\delta))$.

    Fan-in and fan-out are scaled by $\sqrt\gamma$ each, `delta` by $\gamma$ (section 3.2), gates by nothing; where a
    norm sees what a neuron of a residual stream writes, the fan-in is scaled by $\gamma$ and the fan-out not (at
    $\gamma$ = 0 it is zero too). Used slots
    are never overwritten: with too few free slots only the first neurons are written. A neuron whose (scaled) fan-in
    and fan-out are both zero writes nothing and its slot stays free. In a recurrent kernel, newborns have no weights to
    each other. `delta` reaches the rows of slots that were in use, and the biases. Dtypes are kept; everything may be
    traced.

    Args:
        params: the parameters the site was found in.
        site: a growable site.
        neurons: what a method returned: `alpha` `(*stack, D, k)`, `omega` `(*stack, k, Q)` and `delta`.
        amplitude: gamma >= 0, 0-d.
        delta: `(*stack, H, M)` update of the consumers, bias row last iff all of them have a bias; it takes the place
            of the neurons' own `delta`, which is used by default.
        limit: write at most this many neurons, 0-d integer; all by default.
        birth: values, by leaf path, that the scales, shifts and running statistics of the written slots take: 0-d or
            one a neuron, `(*stack, k)`. Default: scale 1, shift 0, mean 0, variance 1. The producer's bias comes from
            `alpha`.

    Returns:
        The parameters, and which slots were written, `(capacity,)` booleans.

    Raises:
        ValueError: for a site that cannot grow, shapes that do not fit it, or a `birth` leaf it does not have.

    Example:
        >>> neurons = tinyjax.methods.tiny(statistics, num_neurons=2)
        >>> params, born = tinyjax.surgery.write(params, site, neurons, amplitude=0.1)
        >>> int(tinyjax.width(params, site)), int(born.sum())
        (6, 2)
    """
    require_growable(site)
    if isinstance(amplitude, int | float) and not amplitude >= 0:
        raise ValueError(f"`amplitude` must be >= 0, got {amplitude}; for the twin pass (-alpha, -omega)")
    leaves = site_leaves(params, site)
    delta = neurons.delta if delta is None else delta
    if site.pattern:
        neurons = whole_heads(site, leaves, neurons)
    _check_shapes(site, neurons, delta)
    free = free_slots(params, site)
    num_neurons = neurons.alpha.shape[-1]
    slot = jnp.arange(site.capacity)
    # slot j, if free, is the rank-th free one: it takes neuron number rank (a `cumsum` would be a dozen operations)
    rank = jnp.sum(free & (slot <= slot[:, None]), axis=1, dtype=jnp.int32) - 1
    written = free & (rank < num_neurons) & (rank < (num_neurons if limit is None else limit))
    index = jnp.clip(rank, 0, num_neurons - 1)
    fan_in, fan_out = _in_slots(site, neurons, index, jnp.asarray(amplitude, neurons.alpha.dtype))
    fan_in = _among_used(site, fan_in, ~free, site.producers, -2).astype(leaves[site.producers[0].leaf].dtype)
    fan_out = _among_used(site, fan_out, ~free, site.consumers, -1).astype(leaves[site.consumers[0].leaf].dtype)
    written &= nonzero_slots(fan_in, -1) | nonzero_slots(fan_out, -2)

    first = 0
    for group in writers(site):
        size = fan_in_size(group)
        leaves |= _fanned_in(leaves, group, fan_in[..., first : first + size, :], written)
        first += size
    for kernel, gate in zip(gating_kernels(site), neurons.gate if site.pattern else (neurons.gate,)):
        mine = jnp.take(gate, index, axis=-1, mode="clip").astype(leaves[kernel.leaf].dtype)
        leaves |= _fanned_in(leaves, [kernel], mine, written)
    first = 0
    for kernel in site.consumers:
        matrix = fan_out_matrix(kernel.layout, fan_out[..., first : first + fan_out_size(kernel)])
        leaves[kernel.leaf] = paste(kernel.layout, leaves[kernel.leaf], matrix, slot_rows(kernel.layout, written))
        first += fan_out_size(kernel)
    if delta is not None:
        leaves |= _updated(site, leaves, delta, amplitude, ~free)
    return replace_leaves(params, leaves | _birth_values(site, leaves, written, index, birth or {})), written


def add_update(params: Params, site: Site, delta: Array, *, amplitude: ArrayLike) -> Params:
    """Adds `amplitude * delta` to the consumers' weights in the rows of used slots, and to their biases.

    Args:
        params: the parameters the site was found in.
        site: a growable site.
        delta: `(*stack, H, M)`, what `best_update` returns; bias row last iff all consumers have a bias.
        amplitude: 0-d, may be traced.

    Returns:
        The updated parameters.

    Raises:
        ValueError: for a site that cannot grow, or an update of another shape.

    Example:
        >>> params = tinyjax.surgery.add_update(params, site, tinyjax.methods.best_update(statistics), amplitude=0.1)
    """
    require_growable(site)
    if delta.shape != (shape := update_shape(site)):
        raise ValueError(f"`delta` has shape {delta.shape}; site `{site.name}` needs {shape}")
    leaves = site_leaves(params, site)
    return replace_leaves(params, _updated(site, leaves, delta, amplitude, ~free_slots(params, site)))


def _updated(
    site: Site, leaves: Mapping[str, Array], delta: Array, amplitude: ArrayLike, used: Array
) -> dict[str, Array]:
    """The consumers' leaves with `amplitude * delta` added to the rows of used slots and to the biases."""
    new: dict[str, Array] = {}
    row = col = 0
    for group in readers(site):
        with_bias = have_bias(group)
        height = rows(group[0]) + with_bias
        for kernel in group:
            update = jnp.asarray(amplitude, delta.dtype) * delta[..., row : row + height, col : col + cols(kernel)]
            new |= _add(leaves, kernel, update, used, with_bias)
            col += cols(kernel)
        row += height
    return new


def _fanned_in(
    leaves: Mapping[str, Array], kernels: Sequence[Kernel], fan_in: Array, written: Array
) -> dict[str, Array]:
    """The leaves of producers whose products are added, with the columns of the written slots replaced.

    The bias row, last iff there is one, goes to the first of them that has a bias.
    """
    new: dict[str, Array] = {}
    first = 0
    for kernel in kernels:
        block = fan_in[..., first : first + rows(kernel), :]
        new[kernel.leaf] = paste(kernel.layout, leaves[kernel.leaf], block, written)
        first += rows(kernel)
    bias = fan_in[..., first:, :]
    for kernel in kernels:
        if kernel.bias is not None:
            new[kernel.bias.leaf] = paste(kernel.bias, leaves[kernel.bias.leaf], bias, written)
            bias = jnp.zeros_like(bias)
    return new


def _among_used(site: Site, fan: Array, used: Array, kernels: Sequence[Kernel], axis: int) -> Array:
    """Fans of new neurons without what they have to do with free slots, each other included, in a recurrent kernel."""
    if not (recurrent := recurrent_leaves(site)):
        return fan
    own = used.astype(fan.dtype)
    sizes = [cols(kernel) if axis == -1 else rows(kernel) for kernel in kernels]
    kept = [own if k.leaf in recurrent else jnp.ones(size, fan.dtype) for k, size in zip(kernels, sizes)]
    bias = jnp.ones(fan.shape[axis] - sum(sizes), fan.dtype)
    mask = jnp.concatenate([*kept, bias])
    return fan * (mask if axis == -1 else mask[:, None])


def _in_slots(site: Site, neurons: Neurons, index: Array, amplitude: Array) -> tuple[Array, Array]:
    """Scaled fan-in `(*stack, D, C)` and fan-out `(*stack, C, Q)` by slot, `index` being the neuron of each slot."""
    into, out_of, alpha = *shares(site, amplitude), neurons.alpha
    if site.gate is not None:  # every neuron reads through its own block alone
        alpha = jnp.sum(alpha.reshape(*alpha.shape[:-2], -1, num_inputs(site), alpha.shape[-1]), axis=-3)
    fan_in = jnp.take(into * alpha, index, axis=-1, mode="clip")
    return fan_in, jnp.take(out_of.astype(neurons.omega.dtype) * neurons.omega, index, axis=-2, mode="clip")


def _add(leaves: Mapping[str, Array], kernel: Kernel, update: Array, used: Array, bias: bool) -> dict[str, Array]:
    """The consumer's leaves with `update` `(*stack, H, M)` added to the rows of used slots and to the bias."""
    old = leaves[kernel.leaf]
    step = jnp.where(slot_rows(kernel.layout, used), update[..., : rows(kernel), :], 0)
    new = {kernel.leaf: old + kernel.layout.from_matrix(step).astype(old.dtype)}
    if bias:
        assert kernel.bias is not None
        old = leaves[kernel.bias.leaf]
        new[kernel.bias.leaf] = old + kernel.bias.from_matrix(update[..., rows(kernel) :, :]).astype(old.dtype)
    return new


def _birth_values(
    site: Site, leaves: Mapping[str, Array], written: Array, index: Array, birth: Mapping[str, ArrayLike]
) -> dict[str, Array]:
    """Scales, shifts and running statistics of the slots just written."""
    fans = (*site.producers, *site.consumers, *gating_kernels(site))
    kernels = {k.leaf for k in fans} | {
        k.bias.leaf for k in (*site.producers, *gating_kernels(site)) if k.bias is not None
    }
    vectors = {m.leaf: m for m in site.members if m.leaf not in kernels}
    for leaf in birth:
        if leaf not in vectors:
            known = ", ".join(f"`{v}`" for v in vectors) or "none"
            raise ValueError(f"`birth` names `{leaf}`; the vectors of site `{site.name}` that it can set: {known}")
    new = {}
    for leaf, member in vectors.items():
        old = member.layout.to_slots(leaves[leaf])
        value = jnp.asarray(birth.get(leaf, NEUTRAL.get(member.role, 0)), old.dtype)
        value = value if value.ndim == 0 else jnp.take(value, index, axis=-1, mode="clip")
        value = jnp.broadcast_to(value, old.shape[:-1])[..., None]
        new[leaf] = member.layout.from_slots(jnp.where(written[:, None], value, old))
    return new


def _check_shapes(site: Site, neurons: Neurons, delta: Array | None) -> None:
    num_neurons = neurons.alpha.shape[-1]
    if num_neurons < 1:
        raise ValueError(f"no neurons to write at site `{site.name}`: `alpha` has shape {neurons.alpha.shape}")
    if not site.pattern and (site.gate is None) != (neurons.gate is None):
        has = "gated units and needs neurons with a `gate`" if site.gate is not None else "no gate, but the neurons do"
        raise ValueError(f"site `{site.name}` has {has}: take neurons from statistics of this site")
    inputs = num_inputs(site)
    outputs = sum(fan_out_size(kernel) for kernel in site.consumers)
    expected: dict[str, tuple[int, ...]] = {
        "alpha": (*lead(site.producers[0]), inputs, num_neurons),
        "omega": (*site.stack, num_neurons, outputs),
    }
    got = {"alpha": neurons.alpha.shape, "omega": neurons.omega.shape}
    if site.gate is not None and neurons.gate is not None:
        if neurons.alpha.ndim == len(site.stack) + 2 and neurons.alpha.shape[-2] % inputs == 0:
            expected["alpha"] = (*site.stack, *neurons.alpha.shape[-2:])  # one block of rows or several
        expected["gate"] = (*site.stack, rows(site.gate) + (site.gate.bias is not None), num_neurons)
        got["gate"] = neurons.gate.shape
    if delta is not None:
        expected["delta"] = update_shape(site)
        got["delta"] = delta.shape
    for name, shape in expected.items():
        if got[name] != shape:
            raise ValueError(f"`{name}` has shape {got[name]}; site `{site.name}` needs {shape}")
