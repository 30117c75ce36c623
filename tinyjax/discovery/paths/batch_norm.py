"""Roles of the vectors along a hidden dimension, and batch normalisation, both read off the data flow.

A new channel behind a batch normalisation is rescaled whatever the norm of its fan-in; it keeps its amplitude only if
the normalisation is the identity on it at birth: scale = sqrt(var + eps), shift = mean. Which vector is which follows
from powers of the product: a mean scales with its first power, a variance with its second, what is normalised with
none.
"""

from collections.abc import Mapping, Sequence

from tinyjax.core.site import Norm
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.parameter_entries import Meeting
from tinyjax.discovery.graph.def_use import DefUse
from tinyjax.discovery.graph.graph import VIEWS, Op, Value
from tinyjax.discovery.paths.dataflow import Flow

_ROOTS = frozenset({"sqrt", "rsqrt"})
_TRANSPARENT = VIEWS | {"broadcast_in_dim"}


def roles(flow: Flow) -> dict[int, str]:
    """What every vector that the flow met does to a neuron: shift, scale, mean, var, counted, or other."""
    found = {leaf: _role(flow, meetings[0]) for leaf, meetings in flow.met.items()}
    found |= dict.fromkeys(flow.counted, "counted")
    if "var" in found.values():  # with running statistics in use, what is subtracted before the scaling is the mean
        for leaf, meetings in flow.met.items():
            if meetings[0].op.name == "sub" and found[leaf] == "shift" and not flow.pools_met(meetings[0].op):
                found[leaf] = "mean"
    return found


def find_norm(
    flow: Flow,
    wiring: DefUse,
    axes: Axes,
    found: Mapping[int, str],
    names: Sequence[str],
    producer_bias: str | None,
    capacity: int,
) -> tuple[Norm | None, str]:
    """The batch normalisation between a product and its consumers, or why what is there cannot be made the identity."""
    uses_running = any(role == "var" and not flow.pools_met(flow.met[leaf][0].op) for leaf, role in found.items())
    if not flow.normalised and not uses_running:
        return None, "its rows meet a summary of themselves (a centring)" if flow.modulated else ""
    if any(summary != capacity for summary in flow.summaries):
        return None, "it is normalised over a part of its rows"
    if len(flow.normalised) > 1 or (flow.normalised and uses_running):
        return None, "it is normalised more than once"
    leaf_of = {
        role: [names[leaf] for leaf, r in found.items() if r == role and names[leaf] != producer_bias]
        for role in ("scale", "shift", "mean", "var")
    }
    if len(leaf_of["scale"]) != 1 or len(leaf_of["shift"]) != 1:
        return None, "it is normalised without one scale and one shift, so that the identity cannot be set at birth"
    if len(leaf_of["mean"]) > 1 or len(leaf_of["var"]) > 1:
        return None, "it is normalised by more than one running statistic"
    epsilon = set(flow.epsilon) if flow.normalised else _running_epsilon(flow, wiring, axes, found)
    if len(epsilon) != 1:
        return None, "it is normalised with an epsilon that cannot be read off"
    mean, var = (leaf_of[role][0] if leaf_of[role] else None for role in ("mean", "var"))
    return Norm(leaf_of["scale"][0], leaf_of["shift"][0], mean, var, epsilon.pop()), ""


def _role(flow: Flow, meeting: Meeting) -> str:
    op, through = meeting
    if through & _ROOTS:
        return "var"
    summed = op.name in ("add", "add_any", "sub")
    averaged = bool(flow.modulated and flow.pools_met(op))  # a statistic of a normalisation, not a pooled activation
    if summed and averaged and not through - _TRANSPARENT - {"mul"}:
        # a running average, times its momentum, and its new term
        return {1.0: "mean", 2.0: "var"}.get(flow.degree_met(op) or 0.0, "other")
    if through - _TRANSPARENT and not flow.meets_root(op):
        return "other"  # 1 + s, exp(s), ...: what an empty or a newborn slot should hold is not known
    if summed:
        return "other" if averaged else "shift"
    return "scale" if op.name in ("mul", "div") else "other"


def _running_epsilon(flow: Flow, wiring: DefUse, axes: Axes, found: Mapping[int, str]) -> set[float]:
    """Constants added to the running variance on its way to the flow."""
    (leaf,) = [leaf for leaf, role in found.items() if role == "var"]
    constants: set[float] = set()
    seen: set[Value] = set()
    queue = [v for v in flow.met[leaf][0].op.ins if axes.parameter_only(v)]
    while queue:
        value = queue.pop()
        op: Op | None = wiring.made_by.get(value)
        if op is None or value in seen:
            continue
        seen.add(value)
        if op.name == "add":
            constants.update(float(c) for v in op.ins if (c := wiring.scalar(v)) is not None)
        queue += op.ins
    return constants
