"""Root-mean-square norms on a residual stream: how they are found in its powers."""

from collections import Counter
from collections.abc import Sequence

from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.primitives import REDUCTIONS
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.dimensions.unification import Atom, roots
from tinyjax.discovery.graph.def_use import is_layout, is_view
from tinyjax.discovery.graph.graph import Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.paths.flow import Flow
from tinyjax.discovery.paths.mixing import is_taken_off
from tinyjax.discovery.paths.refusals import CannotGrow

_SQUARES = ("square", "integer_pow", "mul")
_LINEAR = frozenset("add add_any sub mul div neg broadcast_in_dim reduce_sum slice rev cumsum".split())
_LAYER_NORM = (
    "`{op}` over it is no mean square (a layer norm): a new coordinate would move the mean; centre what is written to "
    "the stream and use an RMS norm, the same function"
)


def is_divided(model: Dimensions, flow: Flow, dimension: Atom, consumers: Sequence[Product]) -> bool | None:
    """Whether norms divide by the number of coordinates; None without a norm.

    Raises:
        CannotGrow: something else than linear operations, readers and root-mean-square norms sees the stream.
    """
    reading, needed = {use.op for use in consumers}, model.axes.needed
    squared: set[Value] = set()
    divided: set[bool] = set()
    for op in flow.ops:
        inside = [v for v in op.ins if v in flow.values]
        if op in reading or not any(v in needed for v in op.outs):
            continue
        if op.name in KNOWN_FUNCTIONS:
            raise CannotGrow("a norm of `tinyjax.models` counts its coordinates; a plain RMS norm can grow")
        along = any(v in flow.values for v in op.outs)
        if _is_square(op, flow):
            squared.update(op.outs)
        elif any(v in squared for v in inside):
            over = [d for d, axis in enumerate(model.axes[inside[0]]) if dimension in roots(axis)]
            if is_view(op) and along:
                squared.update(op.outs)
            elif op.name == "reduce_sum" and sorted(op.params["axes"]) == over:
                divided.add(_divides(model, op.outs[0], dimension.size))
            else:
                raise CannotGrow(f"its squares go into `{op.name}`, which is no mean over them")
        elif not along and op.name in REDUCTIONS:
            centres = is_taken_off(model.def_use, op)
            raise CannotGrow((_LAYER_NORM if centres else "`{op}` over it is no mean square").format(op=op.name))
        elif not along:
            raise CannotGrow(f"`{op.name}` reads it, which is no product with a parameter")
        elif not (is_view(op) or op.name in _LINEAR) or (len(inside) > 1 and op.name in ("mul", "div")):
            raise CannotGrow(f"`{op.name}` lies on it: a stream is linear between its writers and readers")
    for why in dimension.marks:
        if not (divided and why.startswith("its entries are mixed by `reduce_sum`")):
            raise CannotGrow(why)
    if len(divided) > 1:
        raise CannotGrow("one norm divides by its width and another does not")
    return next(iter(divided), None)


def _is_square(op: Op, flow: Flow) -> bool:
    """Whether an operation squares the stream."""
    if op.name not in _SQUARES or op.ins[0] not in flow.values:
        return False
    return op.name == "square" or (op.params["y"] == 2 if op.name == "integer_pow" else op.ins[0] is op.ins[1])


def _divides(model: Dimensions, value: Value, size: int) -> bool:
    """Whether a sum of squares is divided by the number of coordinates; it may be used as it is."""
    found = set()
    queue = [value]
    while queue:
        for user in model.def_use.used_by.get(v := queue.pop(), []):
            if is_layout(user):
                queue += user.outs
                continue
            number = next((c for other in user.ins if (c := model.def_use.scalar(other)) is not None), None)
            if number is not None and (user.name == "mul" or (user.name == "div" and user.ins[0] is v)):
                found.add(float(number) if user.name == "div" else 1 / float(number))
            else:
                found.add(1.0)
    if len(found) == 1 and abs(next(iter(found)) / size - 1) < 1e-6:
        return True
    if found == {1.0}:
        return False
    raise CannotGrow("a norm divides its sum of squares by another number than its width")


def is_behind_norm(flow: Flow, leaf: int) -> bool:
    """Whether a vector meets the stream where its rows have been multiplied by a factor of their own."""
    return bool(flow.factors.of[flow.vectors.entries[leaf][0].op.outs[0]])


def norm_powers(
    model: Dimensions,
    flow: Flow,
    found: dict[int, str],
    writers: Sequence[Product],
    groups: Sequence[Sequence[Product]],
) -> tuple[tuple[str, float], ...]:
    """Which leaves follow the capacity where norms divide by it.

    With c^2 = new / old capacity: what is written is multiplied by c, so that the mean square stays; the scale behind
    every norm by 1 / c, or the kernel of a reader without one.
    """
    powers = {use.leaf: 0.5 for use in writers} | {use.bias.leaf: 0.5 for use in writers if use.bias is not None}
    scales = {leaf for leaf, role in found.items() if role == "scale" and is_behind_norm(flow, leaf)}
    powers |= {model.names[leaf]: 0.5 for leaf, role in found.items() if role == "shift"}
    powers |= {model.names[leaf]: -0.5 for leaf in scales}
    scaled: Counter[Value] = Counter()
    for leaf in scales:
        behind = flow.downstream(flow.vectors.entries[leaf][0].op.outs[0])
        scaled.update(behind.values)
        for op in behind.ops:
            joined = any(v in flow.values and v not in behind.values for v in op.ins)
            if joined or _is_square(op, flow):
                raise CannotGrow(f"what `{model.names[leaf]}` scales behind a norm meets the stream or a norm again")
    for group in groups:
        if scaled[group[0].input_value] > 1:
            raise CannotGrow(f"`{group[0].leaf}` reads it through several scales")
        if not scaled[group[0].input_value]:
            powers |= {use.leaf: -0.5 for use in group}
    return tuple(powers.items())
