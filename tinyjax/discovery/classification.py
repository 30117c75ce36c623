"""The site of a hidden dimension: whether it can grow, by which way, or the reason why not."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from tinyjax.core.layout import Layout
from tinyjax.core.site import Kernel, Member, Site
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom
from tinyjax.discovery.graph.graph import MATMULS
from tinyjax.discovery.kinds.attention_heads import find_whole_heads
from tinyjax.discovery.kinds.attention_scores import NORMED, ROTARY, counts_heads, is_turned
from tinyjax.discovery.kinds.hidden_layer import find_hidden_layer
from tinyjax.discovery.kinds.query_key import find_query_key, is_query_key
from tinyjax.discovery.kinds.recurrent_units import find_recurrent_units, recurs
from tinyjax.discovery.kinds.residual_stream import find_residual_stream, may_be_stream
from tinyjax.discovery.paths.mixing import name_mixing
from tinyjax.discovery.paths.path import Path, Verdict

KINDS: tuple[tuple[Callable[[Dimensions, Atom], bool], Callable[[Dimensions, Atom], Verdict]], ...] = (
    (counts_heads, find_whole_heads),
    (is_query_key, find_query_key),
    (recurs, find_recurrent_units),
)
"""For every kind whether a dimension is one, and what is said of it if so; the first that it is answers.

A dimension that is none of them is bounded by products, of which `find_hidden_layer` makes four kinds.
"""


def classify(model: Dimensions, dimension: Atom) -> tuple[Site, Sequence[Path]]:
    """The site of one dimension, still without a name, and the ways through it if it can grow."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    verdict = _verdict(model, dimension)
    if verdict.reason:
        verdict = verdict._replace(reason=_named(model, dimension, verdict.reason, [*producers, *consumers]))
    if verdict.reason and NORMED not in verdict.reason and is_turned(model, producers):
        verdict = verdict._replace(reason=f"{verdict.reason}; {ROTARY}")
    name = _heads_name([use.leaf for use in (*producers, *consumers)]) if counts_heads(model, dimension) else ""
    return describe(model, dimension, verdict, name), verdict.paths


def _verdict(model: Dimensions, dimension: Atom) -> Verdict:
    """What the first kind that a dimension is says of it; a residual stream is what nothing else is."""
    if dimension in model.obstructed:
        return Verdict(model.obstructed[dimension])
    find = next((find for applies, find in KINDS if applies(model, dimension)), find_hidden_layer)
    verdict = find(model, dimension)
    if verdict.reason and may_be_stream(model, dimension):
        return find_residual_stream(model, dimension, verdict.reason)
    return verdict


def describe(model: Dimensions, dimension: Atom, verdict: Verdict, name: str = "") -> Site:
    """The site of a dimension about which a verdict was given; without `name` it is still to be named."""
    reason, paths = verdict.reason, verdict.paths
    producers, consumers = verdict.producers, verdict.consumers
    if not paths:
        producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    gate_leaf = verdict.gates[0].leaf if verdict.gates else None
    kernels = _kernel_layouts(model, dimension)
    members = tuple(
        _member(model, leaf, factor, kernels, verdict.roles, gate_leaf)
        for leaf, factor in model.leaves.get(dimension, ())
    )
    layers = consumers or producers  # heads are in front of a producer's layers, not of its consumers'
    stack = tuple(layers[0].kernel.factors[f] for f in layers[0].kernel.stack) if layers else ()
    return Site(
        name=name,
        capacity=dimension.size,
        growable=not reason,
        reason=reason,
        members=members,
        producers=_kernels(model, producers, dimension, "cols"),
        consumers=_kernels(model, consumers, dimension, "rows"),
        stack=stack,
        norm=verdict.norm,
        powers=verdict.powers,
        gate=next(iter(_kernels(model, verdict.gates, dimension, "cols")), None),
        pattern=_kernels(model, verdict.pattern, dimension, "cols"),
        stream=verdict.stream,
        kind=paths[0].kind if paths else "",
    )


def _named(model: Dimensions, dimension: Atom, reason: str, uses: Sequence[Product]) -> str:
    """The reason with the name of the pattern it is about, where that pattern is found."""
    derived = next((use.leaf for use in uses if use.op.derived), None)
    if derived is not None:
        return (
            f"the loss differentiates the network (`jax.grad`, `jax.jvp`): `{derived}` is in the derivative too, and "
            "neurons are computed for products of the network alone"
        )
    pattern = name_mixing(model, dimension) if reason in dimension.marks and "are mixed by" in reason else ""
    return f"{reason} ({pattern})" if pattern else reason


def _heads_name(leaves: Sequence[str]) -> str:
    """A name for the heads of an attention: `heads` in the module that all of its kernels are in."""
    parts = [leaf.removeprefix("params/").split("/")[:-1] for leaf in leaves]
    shared = [names[0] for names in zip(*parts) if len(set(names)) == 1]
    return "/".join([*shared, "heads"])


def _kernel_layouts(model: Dimensions, dimension: Atom) -> dict[tuple[str, int], tuple[str, Layout]]:
    """For the factors of the kernels that write or read a dimension, which of it they do and the kernel's layout."""
    found: dict[tuple[str, int], tuple[str, Layout]] = {}
    for uses, role, side in ((model.producing, "fan_in", "cols"), (model.consuming, "fan_out", "rows")):
        for use in uses.get(dimension, []):
            for factor in getattr(use.kernel, side):
                found.setdefault((use.leaf, factor), (role, use.kernel))
    return found


def _member(
    model: Dimensions,
    leaf: int,
    factor: int,
    kernels: Mapping[tuple[str, int], tuple[str, Layout]],
    found: Mapping[int, str],
    gate: str | None,
) -> Member:
    _, sizes, numbers = model.factors[leaf]
    name = model.names[leaf]
    if (name, factor) in kernels:
        role, layout = kernels[name, factor]
        return Member(_with_slot(layout, factor), "gate" if name == gate else role)
    stack = tuple(f for f, number in enumerate(numbers) if number < model.depth(leaf))
    rest = tuple(f for f in range(len(sizes)) if f not in (*stack, factor))
    return Member(Layout(name, sizes, numbers, factor, stack, rest, (factor,)), found.get(leaf, "other"))


def _kernels(model: Dimensions, uses: Sequence[Product], dimension: Atom, side: str) -> tuple[Kernel, ...]:
    """The kernels of some uses, whose slots are on one side of their matrices."""
    factors: dict[str, list[int]] = {}
    for leaf, factor in model.leaves.get(dimension, ()):
        factors.setdefault(model.names[leaf], []).append(factor)

    def slotted(layout: Layout, among: tuple[int, ...]) -> Layout:
        return _with_slot(layout, next((f for f in factors.get(layout.leaf, ()) if f in among), None))

    kernels, positions = {}, {}
    for use in uses:
        bias = use.bias if use.bias is None else slotted(use.bias, use.bias.cols)
        kernels.setdefault(use.leaf, Kernel(slotted(use.kernel, getattr(use.kernel, side)), bias))
        times = math.prod(use.outputs.factors[f] for f in use.outputs.rows) if use.op.name in MATMULS else 0
        positions.setdefault(use.leaf, {})[use.op.path] = times
    num_samples = model.axes.samples.size
    return tuple(
        dataclasses.replace(kernel, positions=-(-sum(positions[leaf].values()) // num_samples))
        for leaf, kernel in kernels.items()
    )


def _with_slot(layout: Layout, slot: int | None) -> Layout:
    return dataclasses.replace(layout, slot=slot)
