"""Roles of the vectors along a hidden dimension, and batch normalisation, both read off the data flow.

A new channel behind a batch normalisation is rescaled whatever the norm of its fan-in; it keeps its amplitude only if
the normalisation is the identity on it at birth: scale = sqrt(var + eps), shift = mean. Which vector is which follows
from powers of the product: a mean scales with its first power, a variance with its second, what is normalised with
none.
"""

from collections.abc import Mapping, Sequence

from tinyjax.core.site import Norm
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.parameter_entries import Entry
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import LAYOUTS, SUMS, Op, Value
from tinyjax.discovery.paths.flow import Flow

_ROOTS = frozenset({"sqrt", "rsqrt"})


def roles(flow: Flow) -> dict[int, str]:
    """What every vector along the slots does to a neuron: shift, scale, mean, var, counted, or other."""
    found = {leaf: _role(flow, entries[0]) for leaf, entries in flow.vectors.entries.items()}
    found |= dict.fromkeys(flow.vectors.counted, "counted")
    if "var" in found.values():  # with running statistics in use, what is subtracted before the scaling is the mean
        for leaf, (first, *_) in flow.vectors.entries.items():
            if first.op.name == "sub" and found[leaf] == "shift" and not flow.poolings.fewest(first.op):
                found[leaf] = "mean"
    return found


def find_norm(
    flow: Flow,
    def_use: DefUse,
    axes: Axes,
    found: Mapping[int, str],
    names: Sequence[str],
    producer_bias: str | None,
    capacity: int,
) -> tuple[Norm | None, str]:
    """The batch normalisation between a product and its consumers, or why what is there cannot be made the identity."""
    variances = (flow.vectors.entries[leaf][0].op for leaf, role in found.items() if role == "var")
    uses_running = any(not flow.poolings.fewest(op) for op in variances)
    if not flow.rows.normalised and not uses_running:
        return None, "its rows meet a summary of themselves (a centring)" if flow.rows.modulated else ""
    if any(summary != capacity for summary in flow.rows.summaries):
        return None, "it is normalised over a part of its rows"
    if len(flow.rows.normalised) > 1 or (flow.rows.normalised and uses_running):
        return None, "it is normalised more than once"
    leaf_of = {
        role: [names[leaf] for leaf, r in found.items() if r == role and names[leaf] != producer_bias]
        for role in ("scale", "shift", "mean", "var")
    }
    if len(leaf_of["scale"]) != 1 or len(leaf_of["shift"]) != 1:
        return None, "it is normalised without one scale and one shift, so that the identity cannot be set at birth"
    if len(leaf_of["mean"]) > 1 or len(leaf_of["var"]) > 1:
        return None, "it is normalised by more than one running statistic"
    epsilon = set(flow.degrees.epsilon) if flow.rows.normalised else _running_epsilon(flow, def_use, axes, found)
    if len(epsilon) != 1:
        return None, "it is normalised with an epsilon that cannot be read off"
    mean, var = (leaf_of[role][0] if leaf_of[role] else None for role in ("mean", "var"))
    return Norm(leaf_of["scale"][0], leaf_of["shift"][0], mean, var, epsilon.pop()), ""


def _role(flow: Flow, entry: Entry) -> str:
    op, through = entry
    if through & _ROOTS:
        return "var"
    summed = op.name in SUMS
    averaged = bool(
        flow.rows.modulated and flow.poolings.fewest(op)
    )  # a statistic of a normalisation, not a pooled activation
    if summed and averaged and not through - LAYOUTS - {"mul"}:
        # a running average, times its momentum, and its new term
        return {1.0: "mean", 2.0: "var"}.get(flow.degrees.read(op, flow.along) or 0.0, "other")
    if through - LAYOUTS and not _has_root(flow, op):
        return "other"  # 1 + s, exp(s), ...: what an empty or a newborn slot should hold is not known
    if summed:
        return "other" if averaged else "shift"
    return "scale" if op.name in ("mul", "div") else "other"


def _has_root(flow: Flow, op: Op) -> bool:
    """Whether a leaf enters an operation through a square root: a running variance in use."""
    return any(e.op is op and e.through & _ROOTS for entries in flow.vectors.entries.values() for e in entries)


def _running_epsilon(flow: Flow, def_use: DefUse, axes: Axes, found: Mapping[int, str]) -> set[float]:
    """Constants added to the running variance on its way to the flow."""
    (leaf,) = [leaf for leaf, role in found.items() if role == "var"]
    constants: set[float] = set()
    seen: set[Value] = set()
    queue = [v for v in flow.vectors.entries[leaf][0].op.ins if axes.parameter_only(v)]
    while queue:
        value = queue.pop()
        op: Op | None = def_use.made_by.get(value)
        if op is None or value in seen:
            continue
        seen.add(value)
        if op.name == "add":
            constants.update(float(c) for v in op.ins if (c := def_use.scalar(v)) is not None)
        queue += op.ins
    return constants
