"""New edges: which tensor of a network, read by which product, would lower the loss the most.

An edge adds b_i W to the pre-activation that a product j computes from h_j, where b_i is what an earlier product reads.
With the old weights free to follow, the best W is TINY with S_perp = S - P G^+ P', the part of b_i that h_j does not
hold already: the joint problem of `tiny_joint`. One capture gives all b_i, h_j and V_goal; the moves are then carried
to the output of the network, where they compare. A diagnosis: the edge itself is a change of the model's code.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.analysis.site_scores import Objective, Outputs, Score, move_at_output
from tinyjax.core.batch import batch_size, take_samples
from tinyjax.core.linalg import matmul
from tinyjax.core.params import Params
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.products import Product, aligned, find_products
from tinyjax.discovery.dimensions.unification import Atom, root
from tinyjax.discovery.graph.def_use import DefUse, is_view
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.graph import Graph, Value
from tinyjax.discovery.graph.tracing import trace
from tinyjax.estimation.recording import Captured, capture, outputs, record
from tinyjax.methods import Neurons, best_update, held_out_update, predicted_gain, tiny_joint, update_gain
from tinyjax.statistics.averages import moments
from tinyjax.statistics.dense import row_sums, with_constant
from tinyjax.statistics.record import Statistics


class Edge(NamedTuple):
    """A new edge from the input of one product to the output of another.

    Attributes:
        weight: (D, M) W, from b_i to the pre-activation of the target.
        delta: (H, M) the update of the target's kernel that goes with it, bias row last iff it has a bias.
        gain: () decrease of psi at the target by both beyond the best update alone, on the samples of the fit.
        score: what they are worth at the output, on samples they were not computed from.
    """

    weight: Array
    delta: Array
    gain: Array
    score: Score


class _Connection(NamedTuple):
    """A source and a target with their rows in one order."""

    source: Product
    target: Product

    @property
    def name(self) -> str:
        return f"{self.source.leaf} -> {self.target.leaf}"


def score_edges(
    model: Outputs,
    objective: Objective,
    params: Params,
    batch: Any,
    *,
    rank: int,
    method: Callable[..., Neurons] = tiny_joint,
    update_ridge: Any = held_out_update,
) -> dict[str, Edge]:
    """Every edge that could be added between two matrix products on the same rows, and what it is worth.

    Edges come from the first half of the batch, scores from the second. Left out: convolutions, products inside scans
    or with rows of their own, kernels used more than once, and edges that would close a circle.

    Args:
        model: `model(params, batch) -> z`.
        objective: `objective(z, batch) -> loss`, the mean over the samples.
        params: the parameters.
        batch: at least 8 samples.
        rank: of the edge's weight, static; min(D, M) is a full one.
        method: from statistics to neurons that bring their `delta`: `tiny_joint` or a `functools.partial` of it.
        update_ridge: of the best update alone, with which edges are compared.

    Returns:
        Edges by name, `"source -> target"`: the kernel that reads b_i already, the kernel whose product is added to.

    Raises:
        ValueError: a batch too small, a rank below 1, a method that brings no update.

    Example:
        >>> def model(params, batch):
        ...     return network.apply(params, batch.image)
        >>> def objective(logits, batch):
        ...     return optax.softmax_cross_entropy_with_integer_labels(logits, batch.label).mean()
        >>> edges = jax.jit(partial(tinyjax.analysis.score_edges, model, objective, rank=1))(params, batch)
        >>> best = max(edges, key=lambda name: float(edges[name].score.gain))
    """
    middle = batch_size(batch) // 2
    if middle < 4:
        raise ValueError(f"edges need at least 8 samples, half of them to compute them from; got {batch_size(batch)}")
    fitting, scoring = (take_samples(batch, start, start + middle) for start in (0, middle))

    def loss_fn(params: Params, batch: Any) -> tuple[Array, Any]:
        z = model(params, batch)
        return objective(z, batch), z

    traced = trace(loss_fn, params, fitting, has_aux=True)
    graph = flatten(traced)
    axes, def_use = Axes(graph, traced.batched, traced.num_samples), DefUse(graph)
    uses, _ = find_products(graph, axes, def_use, traced.leaf_names)
    pairs = _pairs(graph, def_use, uses, axes.samples)
    targets = list({pair.target.op.path: pair.target for pair in pairs}.values())
    both = [*targets, *(pair.source for pair in pairs)]
    captured = capture(traced, jax.tree.leaves((params, fitting)), both, targets)
    leaves = jax.tree.leaves((params, scoring))
    recorded = record(traced, leaves, both)
    structure = jax.tree.structure(jax.eval_shape(model, params, scoring))

    def output(probes: Any) -> Any:
        return jax.tree.unflatten(structure, outputs(traced, leaves, probes)[1:])

    zeros = {use.op.path: jnp.zeros(use.op.outs[0].shape, use.op.outs[0].dtype) for use in targets}
    z, push = jax.linearize(output, zeros)
    edges = {}
    for pair in pairs:
        statistics = _statistics(pair, captured, middle)
        neurons = method(statistics, num_neurons=rank)
        if neurons.delta is None:
            raise ValueError("the `method` of an edge must bring the update that goes with it: `tiny_joint` does")
        alone = best_update(statistics, ridge=update_ridge)
        mean, weight = moments(statistics), matmul(neurons.alpha, neurons.omega)
        gains = [update_gain(mean, delta) for delta in (neurons.delta, alone)]
        b, h = (_rows(use, recorded) for use in pair)
        h = with_constant(h, pair.target.bias is not None)
        moves = [
            move_at_output(objective, z, push(zeros | {pair.target.op.path: _at(pair.target, rows)}), scoring)
            for rows in (matmul(b, weight) + matmul(h, neurons.delta), matmul(h, alone))
        ]
        edges[pair.name] = Edge(
            weight,
            neurons.delta,
            predicted_gain(mean, neurons, neurons.delta) + gains[0] - gains[1],
            Score(moves[0].gain - moves[1].gain, moves[1].gain, moves[0].amplitude),
        )
    return edges


def _pairs(graph: Graph, def_use: DefUse, uses: Sequence[Product], samples: Atom) -> list[_Connection]:
    """Sources with the targets that come after them; every tensor is a source once, under the first kernel's name."""
    plain = [
        use
        for use in uses
        if not use.refusal and use.window is None and not use.op.scans and [u.leaf for u in uses].count(use.leaf) == 1
    ]
    plain = [use for use in plain if root(samples) in (rows := _row_atoms(use)) and len(set(rows)) == len(rows)]
    sources: dict[Value, Product] = {}
    for use in plain:
        sources.setdefault(_tensor(def_use, use), use)
    pairs = []
    for target in plain:
        behind = _reached(graph, target)
        order = [samples, *(a for a in target.rows if a is not None)]
        for tensor, source in sources.items():
            own = tensor is _tensor(def_use, target)
            if not own and source.input_value not in behind and set(_row_atoms(source)) == set(_row_atoms(target)):
                pairs.append(_Connection(aligned(source, order), aligned(target, order)))
    return pairs


def _row_atoms(use: Product) -> list[Atom]:
    return [root(atom) for atom in use.rows if atom is not None]


def _tensor(def_use: DefUse, use: Product) -> Value:
    """What a product reads, layout aside."""
    value = use.input_value
    while (op := def_use.made_by.get(value)) is not None and is_view(op):
        value = op.ins[0]
    return value


def _reached(graph: Graph, use: Product) -> set[Value]:
    """The values that depend on the result of a product."""
    reached = set(use.op.outs)
    for op in graph.ops:
        if any(value in reached for value in op.ins):
            reached.update(op.outs)
    return reached


def _statistics(pair: _Connection, captured: Captured, num_samples: int) -> Statistics:
    """The record of an edge: b_i in the place of the producer's input."""
    b, h = (_rows(use, captured.inputs) for use in pair)
    v = -num_samples * pair.target.outputs.to_matrix(captured.gradients[pair.target.op.path]).astype(h.dtype)
    bias = pair.target.bias is not None
    sums = row_sums(b, h, v, num_samples, bias_prev=False, bias=bias)
    return Statistics(
        count=jnp.array([(num_samples + 1) // 2, num_samples // 2], h.dtype),
        **vars(sums),
        weight_prev=jnp.zeros((b.shape[-1], 1), h.dtype),
        weight=jnp.zeros((h.shape[-1] + bias, v.shape[-1]), h.dtype),
        width=jnp.zeros((), jnp.int32),
        bias_prev=False,
        bias=bias,
    )


def _rows(use: Product, recorded: dict[Any, Array]) -> Array:
    x = use.inputs.to_matrix(recorded[use.op.path])
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _at(target: Product, rows: Array) -> Array:
    """Rows (rows, M) as a change of the target's result."""
    (result,) = target.op.outs
    return target.outputs.from_matrix(rows).reshape(result.shape).astype(result.dtype)
