"""The axes of every tensor of a graph, as products of dimensions.

`Axes` walks a flat graph once and applies the rule of every operation. Penalties on parameters are watched: one that
pulls at empty slots ties the axes it sums over.
"""

from collections.abc import Sequence

from tinyjax.discovery.dimensions.primitive_rules import RULES, reduce_parameters, unknown
from tinyjax.discovery.dimensions.primitives import BETWEEN_ACTIVATIONS, INPUT, REDUCTIONS, SAMPLES, contraction
from tinyjax.discovery.dimensions.unification import Atom, Axis, mark, root, roots, unify
from tinyjax.discovery.graph.flattening import body
from tinyjax.discovery.graph.graph import SUMS, VIEWS, Graph, Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.graph.liveness import behind_loss


class Axes:
    """The axes of every tensor of a graph.

    Attributes:
        samples: the atom that counts the samples of the batch.
        needed: the values that the loss is computed from.
        steps: for every scan over samples, by its path, what its steps count.
        stepped: the values inside scans that take all samples one by one: one for each sample.
    """

    def __init__(self, graph: Graph, batched: Sequence[bool], num_samples: int):
        self.samples = Atom(num_samples, SAMPLES)
        self.steps: dict[tuple[int, ...], Axis] = {}
        self.stepped: set[Value] = set()
        self._of_batch = set(graph.batch)
        self._of: dict[Value, list[Axis]] = {}
        self._parameter_only = set(graph.params)
        self._filled: set[Value] = set()  # with one number: two states that begin with it are not one
        self._power = dict.fromkeys(graph.params, 1)  # how fast a parameter-only tensor vanishes with an empty slot
        self.needed = behind_loss(graph)
        self._dimensions: dict[Value, tuple[tuple[Atom, ...], ...]] = {}
        for value in graph.params:
            self._of[value] = _fresh(value)
        for value, has_samples in zip(graph.batch, batched):
            axes = _fresh(value, INPUT)
            self._of[value] = [(self.samples,), *axes[1:]] if has_samples else axes
        for op in graph.ops:
            self._apply(op)

    def __getitem__(self, value: Value) -> list[Axis]:
        if value not in self._of:
            self._of[value] = _fresh(value, None if value.const is not None else "it has the shape of a constant")
        return self._of[value]

    def dimensions(self, value: Value) -> tuple[tuple[Atom, ...], ...]:
        """The dimensions of every axis of a tensor; to be asked once all operations are known."""
        if value not in self._dimensions:
            self._dimensions[value] = tuple(tuple(roots(axis)) for axis in self[value])
        return self._dimensions[value]

    def has(self, value: Value, dimension: Atom) -> bool:
        """Whether a dimension is one of a tensor."""
        return any(dimension in axis for axis in self.dimensions(value))

    def parameter_only(self, value: Value) -> bool:
        """Whether a tensor is computed from parameters and constants alone."""
        return value.kind == "const" or value in self._parameter_only

    def depends_on_batch(self, value: Value) -> bool:
        """Whether a tensor is computed from the batch; of what a scan carries it is taken for granted."""
        return value in self._of_batch

    def _apply(self, op: Op) -> None:
        ins = [_fresh(v) if op.name == "scan_carry" and v in self._filled else self[v] for v in op.ins]
        outs = [_fresh(v) for v in op.outs]
        rule = _through if op.name in KNOWN_FUNCTIONS else RULES.get(op.name, unknown)
        if op.name in REDUCTIONS and all(self.parameter_only(v) for v in op.ins):
            rule = reduce_parameters  # an L2 penalty ties nothing
        self._of.update(zip(op.outs, rule(op, ins, outs)))
        self._step(op)
        if op.name == "scan_carry" or any(v in self._of_batch for v in op.ins):
            self._of_batch.update(op.outs)
        if op.name == "broadcast_in_dim" and op.ins[0].const is not None:
            self._filled.update(op.outs)
        if op.name == "dot_general" and not any(self.parameter_only(v) for v in op.ins):
            sides = contraction(op)
            for axes, summed, paired in zip(ins, sides.contracted, sides.batched):
                for d in (*summed, *paired):
                    mark(axes[d], BETWEEN_ACTIVATIONS)
        # What enters a scan as a constant may be anything in the next step.
        if op.ins and op.name != "scan_carry" and all(self.parameter_only(v) for v in op.ins):
            self._parameter_only.update(op.outs)
            self._pull(op, ins)

    def _step(self, op: Op) -> None:
        """Notes a scan over samples, and that what it returns for every step is one for every sample."""
        if op.name == "scan_in":
            steps = roots(self[op.ins[0]][0])
            if steps and all(SAMPLES in atom.marks for atom in steps):
                self.steps.setdefault(op.path, tuple(steps))
        elif op.name == "scan_out" and op.path in self.steps:
            self._of[op.outs[0]][0] = self.steps[op.path]
        if any(self.steps.get(scan.path) == (root(self.samples),) for scan in op.scans):
            self.stepped.update(op.outs)

    def sample_atoms(self) -> list[Atom]:
        """The atoms that count the samples: several where the batch was reshaped into micro-batches."""
        return roots((self.samples,))

    def _pull(self, op: Op, ins: list[list[Axis]]) -> None:
        """Marks the axes summed by a penalty with a gradient in an empty slot (L1, a distance to a point)."""
        powers = [self._power.get(v, 0) for v in op.ins]
        self._power.update(dict.fromkeys(op.outs, _vanishing(op, powers)))
        if op.name in REDUCTIONS and powers[0] < 2 and op.outs[0] in self.needed:
            for axis in op.params["axes"]:
                mark(ins[0][axis], "a function of the parameters in the loss pulls at its empty slots")


def _through(op: Op, ins: list[list[Axis]], outs: list[list[Axis]]) -> list[list[Axis]]:
    """The rule of a function known by its name: axes are followed through its body, where no reduction ties them."""
    graph = body(op)
    inner = Axes(graph, [False] * len(ins), 1)
    outer: dict[Atom, Axis] = {}
    for value, axes in zip(graph.batch, ins):
        for (atom,), axis in zip(inner[value], axes):
            if atom.size > 1:
                unify(outer.setdefault(root(atom), axis), axis)
    for d, axis in enumerate(inner[graph.loss]):
        found = roots(axis)
        if len(found) == 1 and found[0] in outer:
            outs[0][d] = outer[found[0]]
        elif found:
            mark(outs[0][d], f"it passes through `{op.name}`")
    return outs


def _vanishing(op: Op, powers: Sequence[int]) -> int:
    """The power of a small slot to which a function of parameters is proportional, from those of its operands."""
    if op.name in ("mul", "dot_general"):
        return sum(powers)
    if op.name == "square":
        return 2 * powers[0]
    if op.name == "integer_pow":
        return max(op.params["y"], 0) * powers[0]
    if op.name in SUMS:
        return min(powers)
    if op.name == "div":
        return powers[0] if powers[1] == 0 else 0
    kept = op.name in VIEWS or op.name in ("neg", "abs", "broadcast_in_dim", "reduce_sum", "stop_gradient", "scan_out")
    return powers[0] if kept else 0


def _fresh(value: Value, why: str | None = None) -> list[Axis]:
    return [(Atom(n, why),) for n in value.shape]
