"""What enters and what is asked of the operations of a loss, in one backward pass and without any weight gradient.

The traced loss is interpreted: at a *tapped* operation an operand is recorded, or a zero probe is added to the result.
The gradient of the loss with respect to the probes is the gradient with respect to the tapped results, -V_goal / n.
Calls, remat and scans around a tapped operation are kept as what they are.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import eval_jaxpr
from jax.extend.core import Jaxpr, JaxprEqn, Literal
from jaxtyping import Array

from tinyjax.core.jaxprs import JIT, REMAT, subjaxpr
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.flattening import scan_counts
from tinyjax.discovery.graph.graph import Address
from tinyjax.discovery.graph.tracing import Trace


class Captured(NamedTuple):
    """What a capture returns.

    Attributes:
        loss: the loss of the batch, ().
        inputs: for every recorded operation, by its address, the operand (of a use, the one that is not the kernel).
        gradients: for every probed use, by its address, d loss / d result.
    """

    loss: Array
    inputs: dict[Address, Array]
    gradients: dict[Address, Array]


class Taps(NamedTuple):
    """Where to record and where to probe: which operand of an address, and what is added to its result."""

    records: Mapping[Address, int]
    probes: Mapping[Address, Array]

    def under(self, address: Address) -> "Taps":
        """The taps at or inside an address."""
        depth = len(address)
        return Taps(
            {at: k for at, k in self.records.items() if at[:depth] == address},
            {at: p for at, p in self.probes.items() if at[:depth] == address},
        )

    def __bool__(self) -> bool:
        return bool(self.records or self.probes)


def capture(
    traced: Trace,
    inputs: Sequence[Array],
    recorded: Sequence[Product],
    probed: Sequence[Product],
    operands: Mapping[Address, int] = MappingProxyType({}),
) -> Captured:
    """Runs a traced loss on flat inputs, recording the inputs of some uses and the gradients at the results of others.

    Args:
        traced: the loss, traced at the shapes of `inputs`.
        inputs: the leaves of `(params, batch)`.
        recorded: uses whose input is wanted.
        probed: uses at whose result the gradient of the loss is wanted.
        operands: other operations, by address, of which an operand is wanted; it comes back among the inputs.

    Returns:
        Arrays with the lengths of the enclosing scans in front.
    """
    records = {use.op.path: 1 - use.operand for use in recorded} | dict(operands)
    zeros = {use.op.path: _zeros(use) for use in probed}
    again = {use.op.path: use.op.twins for use in probed}  # a product that is computed twice is probed twice

    def run(probes: dict[Address, Array]) -> tuple[Array, dict[Address, Array]]:
        everywhere = probes | {twin: probes[at] for at, twins in again.items() for twin in twins}
        outs, arrays = _run(traced.jaxpr.jaxpr, traced.jaxpr.consts, inputs, Taps(records, everywhere), ())
        return outs[0], arrays

    loss, pull, arrays = jax.vjp(run, zeros, has_aux=True)
    (gradients,) = pull(jnp.ones_like(loss))
    return Captured(loss, arrays, gradients)


def record(traced: Trace, inputs: Sequence[Array], uses: Sequence[Product]) -> dict[Address, Array]:
    """The inputs of some uses, by address, without any backward pass."""
    taps = Taps({use.op.path: 1 - use.operand for use in uses}, {})
    return _run(traced.jaxpr.jaxpr, traced.jaxpr.consts, inputs, taps, ())[1]


def outputs(traced: Trace, inputs: Sequence[Array], probes: Mapping[Address, Array]) -> list[Array]:
    """Everything a traced loss returns, with something added to the results of some operations, by address."""
    return _run(traced.jaxpr.jaxpr, traced.jaxpr.consts, inputs, Taps({}, probes), ())[0]


def _zeros(use: Product) -> Array:
    (result,) = use.op.outs
    return jnp.zeros((*use.op.stack, *result.shape), result.dtype)


def _run(
    jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], taps: Taps, at: Address
) -> tuple[list[Any], dict[Address, Array]]:
    """Evaluates a jaxpr with taps: its results, and what was recorded."""
    env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts)) | dict(zip(jaxpr.invars, args))
    arrays: dict[Address, Array] = {}

    def read(v: Any) -> Any:
        return v.val if isinstance(v, Literal) else env[v]

    for i, eqn in enumerate(jaxpr.eqns):
        address, values = (*at, i), [read(v) for v in eqn.invars]
        mine = taps.under(address)
        if not mine:
            outs = evaluate(eqn, values)
        elif eqn.primitive.name in JIT:
            outs, more = _run(*subjaxpr(eqn), values, mine, address)
            arrays |= more
        elif eqn.primitive.name in REMAT:
            outs, more = _run_remat(eqn, values, mine, address)
            arrays |= more
        elif eqn.primitive.name == "scan":
            outs, more = _run_scan(eqn, values, mine, address)
            arrays |= more
        else:
            if address in mine.records:
                arrays[address] = values[mine.records[address]]
            outs = evaluate(eqn, values)
            if address in mine.probes:
                outs = [outs[0] + mine.probes[address]]
        env.update(zip(eqn.outvars, outs))
    return [read(v) for v in jaxpr.outvars], arrays


def evaluate(eqn: JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The results of an equation; what is given for a literal operand does not matter."""
    operands = [(v, x) for v, x in zip(eqn.invars, values) if not isinstance(v, Literal)]
    single = Jaxpr((), [v for v, _ in operands], eqn.outvars, [eqn], eqn.effects)
    return eval_jaxpr(single, (), *[x for _, x in operands])


def _run_remat(eqn: JaxprEqn, values: Sequence[Any], taps: Taps, at: Address) -> tuple[list[Any], dict[Address, Array]]:
    body, consts = subjaxpr(eqn)

    def run(values: Sequence[Any], probes: dict[Address, Array]) -> tuple[list[Any], dict[Address, Array]]:
        return _run(body, consts, values, Taps(taps.records, probes), at)

    again = jax.checkpoint(run, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return again(values, dict(taps.probes))


def _run_scan(eqn: JaxprEqn, values: Sequence[Any], taps: Taps, at: Address) -> tuple[list[Any], dict[Address, Array]]:
    (num_consts, num_carry), (body, body_consts) = scan_counts(eqn), subjaxpr(eqn)
    consts, init, xs = (
        values[:num_consts],
        values[num_consts : num_consts + num_carry],
        values[num_consts + num_carry :],
    )

    def step(carry: Sequence[Any], x: Any) -> tuple[Any, Any]:
        x, probes = x
        outs, arrays = _run(body, body_consts, [*consts, *carry, *x], Taps(taps.records, probes), at)
        return outs[:num_carry], (outs[num_carry:], arrays)

    params = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    carry, (ys, arrays) = lax.scan(step, init, (xs, dict(taps.probes)), **params)
    return [*carry, *ys], arrays
