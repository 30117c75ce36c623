"""The loss as a flat list of operations: JAX's jaxpr with its calls and loops written out."""

import dataclasses
from typing import Any, NamedTuple

from jax.extend.core import JaxprEqn

MATMULS = frozenset({"dot_general", "conv_general_dilated"})
# Operations that only rename or rearrange entries: what they return is the same tensor.
VIEWS = frozenset(
    """reshape transpose squeeze convert_element_type copy copy_p sharding_constraint optimization_barrier name
    scan_in""".split()
)
LAYOUTS = VIEWS | {"broadcast_in_dim"}  # and those that repeat entries
ADDITIONS = frozenset({"add", "add_any"})
SUMS = ADDITIONS | {"sub"}


@dataclasses.dataclass(eq=False, frozen=True)
class Value:
    """A tensor of the graph (compared by identity).

    Attributes:
        shape: its shape.
        dtype: its dtype.
        kind: `"param"`, `"batch"`, `"const"`, or `"op"`.
        index: which parameter or batch leaf.
        const: the number, for a scalar literal.
        array: the array, for another constant whose entries are known.
    """

    shape: tuple[int, ...]
    dtype: Any
    kind: str = "op"
    index: int = -1
    const: Any = None
    array: Any = None


class Scan(NamedTuple):
    """A scan: its path, its number of steps, and whether it begins with the last one."""

    path: tuple[int, ...]
    length: int
    reverse: bool


@dataclasses.dataclass(eq=False, frozen=True)
class Op:
    """One operation of the flat graph.

    Attributes:
        name: the primitive's name, or one of the pseudo-operations `scan_carry` (a value passed around
            a scan or out of it), `scan_in` and `scan_out` (slices in and out of a scan) and `cond_out` (the results of
            the branches of a cond).
        ins: operands.
        outs: results.
        eqn: the equation, None for a pseudo-operation.
        path: indices of the equation and of those around it, outermost first: the operation's identity.
        scans: the scans around it, outermost first.
        inside: opaque calls around it (`cond`, `custom_vjp_call`, ...), through which nothing can be probed.
        chosen_by: of a `cond_out`, what decides between its operands.
        twins: paths of the same operation on the same values elsewhere in the trace, which the graph leaves out.
        derived: whether it belongs to a derivative that the loss itself takes (`jax.grad`, `jax.jvp` inside it).
    """

    name: str
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    eqn: JaxprEqn | None
    path: tuple[int, ...]
    scans: tuple[Scan, ...] = ()
    inside: tuple[str, ...] = ()
    chosen_by: tuple[Value, ...] = ()
    twins: tuple[tuple[int, ...], ...] = ()
    derived: bool = False

    @property
    def stack(self) -> tuple[int, ...]:
        """Lengths of the scans around it."""
        return tuple(scan.length for scan in self.scans)

    @property
    def params(self) -> dict[str, Any]:
        """Parameters of the equation."""
        return {} if self.eqn is None else self.eqn.params


class Graph(NamedTuple):
    """The flat graph of a trace: parameters, batch leaves, operations in order, the loss."""

    params: tuple[Value, ...]
    batch: tuple[Value, ...]
    ops: tuple[Op, ...]
    loss: Value


Address = tuple[int, ...]
