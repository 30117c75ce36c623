"""Discovery: the hidden dimensions of a model, read off the jaxpr of its loss.

Every axis of every parameter leaf is traced through the graph (`axes`); those that turn out to be the same dimension
form one `Site`: the kernels that produce it, the kernels that consume it, and the vectors in between. A dimension that
cannot grow is listed too, with the reason.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tinyjax.atoms import Atom, parts, root
from tinyjax.axes import BETWEEN_ACTIVATIONS, INPUT, Axes, contraction
from tinyjax.flow import ROW_BY_ROW, Flow, entries
from tinyjax.geometry import Geometry, Unaligned, is_rowwise, lay_out
from tinyjax.layout import Layout, Params
from tinyjax.norms import find_norm, roles
from tinyjax.site import Kernel, Member, Norm, Site, Sites
from tinyjax.trace import Graph, Trace, Value, flatten, trace
from tinyjax.uses import Use, Wiring, find_uses, leaf_factors


def find_sites(loss_fn: Callable[..., Any], params: Params, batch: Any, *, has_aux: bool = False) -> Sites:
    """The hidden dimensions of a model.

    Nothing is run: the loss is traced once, so `params` and `batch` may be abstract (`jax.ShapeDtypeStruct`). Trace at
    a capacity of at least two slots a layer and with at least two samples: an axis of length one has no identity.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`, the mean over the samples of the batch.
        params: any pytree of arrays the hidden dimensions run through.
        batch: any pytree; every leaf has the samples as leading axis, except typed PRNG keys and 0-d leaves.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        The sites in the order in which the model computes them, also those that cannot grow (with `reason`).

    Raises:
        ValueError: the batch is empty or ragged, has a single sample, the loss is not a scalar, or a kernel is integer.

    Example:
        >>> import jax, jax.numpy as jnp, tinyjax
        >>> params = {"in": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}
        >>> loss_fn = lambda p, x: jnp.mean((jax.nn.relu(x @ p["in"]) @ p["out"]) ** 2)
        >>> tinyjax.find_sites(loss_fn, params, jnp.ones((16, 4)))["in"].capacity
        8
    """
    return discover(trace(loss_fn, params, batch, has_aux=has_aux)).sites


class Path(NamedTuple):
    """One way through a site: a product that writes the dimension and the products that read it.

    Attributes:
        producer: the use that writes.
        consumers: the uses that read, their rows in the order of the producer's.
        geometry: how rows are pixels of images, or None where all of them are the same rows.
    """

    producer: Use
    consumers: tuple[Use, ...]
    geometry: Geometry | None = None


class Discovery(NamedTuple):
    """What a trace says about a model.

    Attributes:
        sites: the hidden dimensions.
        paths: for every growable site, by name, its paths.
        graph: the flat graph.
        axes: the axes of its tensors.
    """

    sites: Sites
    paths: dict[str, tuple[Path, ...]]
    graph: Graph
    axes: Axes


def discover(traced: Trace) -> Discovery:
    """Finds the hidden dimensions of a traced loss; see `find_sites`."""
    if traced.num_samples < 2:
        raise ValueError("`batch` has a single sample; trace with at least two, an axis of length one has no identity")
    graph = flatten(traced)
    axes = Axes(graph, traced.batched, traced.num_samples)
    wiring = Wiring(graph)
    names = traced.leaf_names
    uses, obstructed = find_uses(graph, axes, wiring, names)
    _refuse_integer_kernels(graph, uses, names)
    finder = _Finder(graph, axes, wiring, names, uses, obstructed)
    found = finder.sites()
    return Discovery(Sites(site for site, _ in found), {s.name: p for s, p in found if s.growable}, graph, axes)


class _Finder:
    """The state of one discovery: everything a single dimension is judged by."""

    def __init__(
        self,
        graph: Graph,
        axes: Axes,
        wiring: Wiring,
        names: Sequence[str],
        uses: Sequence[Use],
        obstructed: dict[Value, str],
    ):
        self.graph, self.axes, self.wiring, self.names, self.uses = graph, axes, wiring, names, uses
        self.leaves: dict[Atom, list[tuple[int, int]]] = {}  # dimension -> (leaf, factor)
        self.factors = [leaf_factors(axes, value) for value in graph.params]
        for leaf, (atoms, _, _) in enumerate(self.factors):
            for factor, atom in enumerate(atoms):
                if atom is not None:
                    self.leaves.setdefault(root(atom), []).append((leaf, factor))
        self.producing: dict[Atom, list[Use]] = {}
        self.consuming: dict[Atom, list[Use]] = {}
        for use in uses:
            kept, contracted = kernel_atoms(axes, use)
            for atom in kept:
                self.producing.setdefault(root(atom), []).append(use)
            for atom in contracted:
                self.consuming.setdefault(root(atom), []).append(use)
        self.obstructed: dict[Atom, str] = {}
        for value, why in obstructed.items():
            for axis in axes[value]:
                for atom in parts(axis):
                    self.obstructed.setdefault(root(atom), why)
        self.matrices = {use.leaf for use in uses}
        self.entries = entries(graph, axes, wiring)
        self.order = {op: i for i, op in enumerate(graph.ops)}

    def sites(self) -> list[tuple[Site, tuple[Path, ...]]]:
        """All hidden dimensions, in the order of their first product."""
        dimensions = [d for d in self.leaves if self._is_hidden(d)]
        judged = [self._judge(d) for d in sorted(dimensions, key=self._first_op)]
        return self._named([*judged, *self._single()]) + self._unseen(dimensions)

    def _is_hidden(self, dimension: Atom) -> bool:
        produced, consumed = dimension in self.producing, dimension in self.consuming
        if produced and consumed:
            return True
        if produced and any(self._feeds(use) for use in self.producing[dimension]):
            return True
        matrices = {leaf for leaf, _ in self.leaves[dimension] if len(self.graph.params[leaf].shape) > 1}
        used = consumed or dimension in self.obstructed or BETWEEN_ACTIVATIONS in dimension.marks
        return len(matrices) > 1 and used and INPUT not in dimension.marks

    def _feeds(self, producer: Use) -> bool:
        """Whether anything computed from a product enters another product: then it is no output of the model."""
        return bool(self._fed(producer))

    def _fed(self, producer: Use) -> list[Use]:
        reached = set(producer.op.outs)
        for op in self.graph.ops:
            if any(v in reached for v in op.ins):
                reached.update(op.outs)
        return [use for use in self.uses if use.input_value in reached]

    def _single(self) -> list[tuple[Site, tuple[Path, ...]]]:
        """Hidden dimensions of one slot: an axis of length one cannot be told from the axes that broadcasting makes."""
        found = {}
        for producer in self.uses:
            kept, _ = kernel_atoms(self.axes, producer)
            readers = [] if kept else [u for u in self._fed(producer) if not kernel_atoms(self.axes, u)[1]]
            if readers and len(self.graph.params[self.names.index(producer.leaf)].shape) > 1:
                why = "it has a single slot, and an axis of length one has no identity; trace with at least two slots"
                kernels = (Kernel(producer.kernel),), (Kernel(readers[0].kernel),)
                found.setdefault(producer.leaf, (Site("", 1, False, why, (), *kernels), ()))
        return list(found.values())

    def _first_op(self, dimension: Atom) -> int:
        uses = self.producing.get(dimension, []) + self.consuming.get(dimension, [])
        return min((self.order[use.op] for use in uses), default=len(self.order))

    def _judge(self, dimension: Atom) -> tuple[Site, tuple[Path, ...]]:
        producers, consumers = self.producing.get(dimension, []), self.consuming.get(dimension, [])
        reason = self._static_reason(dimension, producers, consumers)
        paths: tuple[Path, ...] = ()
        found: dict[int, str] = {}
        norm = None
        if not reason:
            reason, paths, found, norm = self._paths(dimension, producers, consumers)
        if paths:
            producers = [path.producer for path in paths]
            consumers = [consumer for path in paths for consumer in path.consumers]
        members = tuple(self._member(leaf, factor, dimension, found) for leaf, factor in self.leaves[dimension])
        stack = tuple(producers[0].kernel.factors[f] for f in producers[0].kernel.stack) if producers else ()
        site = Site(
            name="",
            capacity=dimension.size,
            growable=not reason,
            reason=reason,
            members=members,
            producers=self._kernels(producers, dimension),
            consumers=self._kernels(consumers, dimension),
            stack=stack,
            norm=norm,
        )
        return site, paths

    def _static_reason(self, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]) -> str:
        """Why the dimension cannot grow, as far as the shapes of its kernels tell."""
        if dimension in self.obstructed:
            return self.obstructed[dimension]
        if BETWEEN_ACTIVATIONS in dimension.marks:
            return BETWEEN_ACTIVATIONS
        written, read = list(dict.fromkeys(u.leaf for u in producers)), list(dict.fromkeys(u.leaf for u in consumers))
        both = [leaf for leaf in written if leaf in read]
        if both:
            return f"`{both[0]}` both writes and reads it (a recurrence or tied weights)"
        if len(written) != 1:
            return f"{len(written)} producers" + (
                " (a residual stream or a gated unit)" if written else " (an embedding?)"
            )
        for use in (*producers, *consumers):
            if use.trouble:
                return use.trouble
        if dimension.marks:
            return next(iter(dimension.marks))
        for use in producers:
            if len(use.kernel.cols) != 1:
                return f"`{use.leaf}` produces it together with another axis (attention heads?)"
        repeated = [leaf for leaf, _ in self.leaves[dimension]]
        twice = next((leaf for leaf in repeated if repeated.count(leaf) > 1), None)
        if twice is not None:
            return f"it runs twice through `{self.names[twice]}`"
        return ""

    def _paths(
        self, dimension: Atom, producers: Sequence[Use], consumers: Sequence[Use]
    ) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
        """The aligned producer-consumer pairs, the roles of the vectors met on the way, or why there are none."""
        paths, found, norms = [], {}, []
        kernels = (*producers, *consumers)
        accounted = {use.op for use in kernels}
        for producer in producers:
            flow = Flow(self.graph, self.axes, self.wiring, producer, dimension)
            mine = tuple(c for c in consumers if c.input_value in flow.mixing)
            if sorted(c.leaf for c in mine) != sorted({c.leaf for c in consumers}):
                return _refusal("its consumers do not each read the output of one producer operation once")
            reason = self._row_reason(producer, mine, flow) or self._meeting_reason(flow, kernels)
            if reason:
                return _refusal(reason)
            found |= roles(flow)
            accounted |= {meetings[0].op for meetings in flow.met.values()}
            bias = None if producer.bias is None else producer.bias.leaf
            norm, reason = find_norm(flow, self.wiring, self.axes, found, self.names, bias, dimension.size)
            if norm is not None and (len(producers) > 1 or producer.op.stack):
                reason = "a batch normalisation inside a scan, or behind a kernel that is used more than once"
            if reason:
                return _refusal(reason)
            norms.append(norm)
            try:
                paths.append(self._path(producer, mine, flow, dimension))
            except Unaligned as unaligned:
                return _refusal(str(unaligned))
        reached = [id(c) for path in paths for c in path.consumers]
        if len(reached) != len(consumers) or len(set(norms)) > 1:
            return _refusal("its consumers do not each read the output of one producer operation")
        known = ("shift", "scale") if norms[0] is None else ("shift", "scale", "mean", "var")
        for leaf, _ in self.leaves[dimension]:
            for op, _ in self.entries.get(leaf, ()):
                if op not in accounted:
                    return _refusal(f"`{self.names[leaf]}` also enters the model through `{op.name}`")
            if self.names[leaf] not in {u.leaf for u in kernels} and found.get(leaf) not in known:
                return _refusal(f"`{self.names[leaf]}` is neither a plain shift nor a plain scale (a normalisation?)")
        return "", tuple(paths), found, norms[0]

    def _path(self, producer: Use, consumers: tuple[Use, ...], flow: Flow, dimension: Atom) -> Path:
        """The uses of a path with their rows in one order."""
        pools = flow.pools[consumers[0].input_value]
        if is_rowwise(producer, consumers, pools):
            order = [self.axes.samples, *(a for a in producer.rows if a is not None)]
            return Path(aligned(producer, order), tuple(aligned(c, order) for c in consumers))
        geometry, producer, consumers = lay_out(self.axes, producer, consumers, pools, dimension)
        return Path(producer, consumers, geometry)

    def _meeting_reason(self, flow: Flow, kernels: Sequence[Use]) -> str:
        """Why a leaf that the flow met makes the dimension other than a plain hidden layer."""
        for leaf, meetings in flow.met.items():
            if self.names[leaf] in {use.leaf for use in kernels}:
                return f"`{self.names[leaf]}` also enters the model through `{meetings[0].op.name}`"
            if len(meetings) > 1:
                return f"`{self.names[leaf]}` acts on it more than once"
        return ""

    def _row_reason(self, producer: Use, consumers: Sequence[Use], flow: Flow) -> str:
        """Why the consumers do not read what the producer wrote, slot by slot, with empty slots at zero."""
        if len({self._tensor(c) for c in consumers}) > 1:
            return "its consumers read different tensors"
        for consumer in consumers:
            same_scans = producer.op.scans == consumer.op.scans
            if not same_scans or len(producer.kernel.stack) != len(consumer.kernel.stack):
                return f"`{consumer.leaf}` reads it in another scan than `{producer.leaf}` writes it"
            if flow.mixing[consumer.input_value] != ROW_BY_ROW:
                return flow.mixing[consumer.input_value]
            rows = [root(a) for a in consumer.rows if a is not None]
            if len(set(rows)) != len(rows):
                return f"`{consumer.leaf}` reads rows that cannot be told apart"
            if root(self.axes.samples) not in rows:
                return f"the input of `{consumer.leaf}` does not depend on the samples"
            culprit = flow.culprit.get(consumer.input_value)
            if culprit is not None:
                value = flow.empty.get(consumer.input_value)
                arrives = "something unknown" if value is None else f"{float(value):.3g}"
                return f"an empty neuron is not silent: `{culprit}` maps 0 to {arrives} (use sigma(x) - sigma(0))"
        return ""

    def _tensor(self, use: Use) -> Value:
        """The tensor a consumer reads, layout aside."""
        value = use.input_value
        while (op := self.wiring.made_by.get(value)) is not None and op.name in (
            "reshape", "transpose", "squeeze", "convert_element_type", "copy",
        ):  # fmt: skip
            value = op.ins[0]
        return value

    def _member(self, leaf: int, factor: int, dimension: Atom, found: dict[int, str]) -> Member:
        _, sizes, numbers = self.factors[leaf]
        name = self.names[leaf]
        for uses, role in ((self.producing, "fan_in"), (self.consuming, "fan_out")):
            for use in uses.get(dimension, []):
                if use.leaf == name and use.kernel.factors:
                    return Member(_with_slot(use.kernel, factor), role)
        stack = tuple(f for f, number in enumerate(numbers) if number < self._depth(leaf))
        rest = tuple(f for f in range(len(sizes)) if f not in (*stack, factor))
        return Member(Layout(name, sizes, numbers, factor, stack, rest, (factor,)), found.get(leaf, "other"))

    def _depth(self, leaf: int) -> int:
        return max(view.depth for view in self.wiring.views.values() if view.leaf == leaf)

    def _kernels(self, uses: Sequence[Use], dimension: Atom) -> tuple[Kernel, ...]:
        factor_of = {self.names[leaf]: factor for leaf, factor in self.leaves[dimension]}
        kernels = {}
        for use in uses:
            bias = use.bias if use.bias is None else _with_slot(use.bias, factor_of.get(use.bias.leaf))
            kernels.setdefault(use.leaf, Kernel(_with_slot(use.kernel, factor_of.get(use.leaf)), bias))
        return tuple(kernels.values())

    def _named(self, judged: Sequence[tuple[Site, tuple[Path, ...]]]) -> list[tuple[Site, tuple[Path, ...]]]:
        taken: dict[str, int] = {}
        named = []
        for site, paths in judged:
            leaf = site.producers[0].leaf if site.producers else site.members[0].leaf
            name = self._short_name(leaf)
            taken[name] = taken.get(name, 0) + 1
            if taken[name] > 1:
                name = f"{name}[{taken[name] - 1}]"
            named.append((dataclasses.replace(site, name=name), paths))
        return named

    def _short_name(self, leaf: str) -> str:
        """The module's path where the kernel is its only matrix, else the leaf's path; without a leading `params`."""
        leaf = leaf.removesuffix("/value")  # the inner name of an NNX variable
        parent = leaf.rpartition("/")[0]
        siblings = [m for m in self.matrices if m.removesuffix("/value").rpartition("/")[0] == parent]
        short = parent if parent not in ("", "params") and len(siblings) <= 1 else leaf
        return short.removeprefix("params/")

    def _unseen(self, dimensions: Sequence[Atom]) -> list[tuple[Site, tuple[Path, ...]]]:
        """Matrices that no use and no listed dimension accounts for."""
        listed = {leaf for d in dimensions for leaf, _ in self.leaves[d]}
        unseen = []
        for leaf, value in enumerate(self.graph.params):
            wide = [n for n in value.shape[self._depth(leaf) :] if n > 1]
            if leaf in listed or self.names[leaf] in self.matrices or len(wide) < 2 or self._is_shift(leaf):
                continue
            why = f"`{self.names[leaf]}` never reaches a matrix product that can be seen{self._first_user(leaf)}"
            unseen.append((Site(self._short_name(self.names[leaf]), wide[-1], False, why, (), (), ()), ()))
        return unseen

    def _is_shift(self, leaf: int) -> bool:
        """Whether a leaf is only added to activations (a bias with two axes, a position embedding)."""
        found = self.entries.get(leaf, ())
        return bool(found) and all(op.name in ("add", "add_any") for op, _ in found)

    def _first_user(self, leaf: int) -> str:
        for view, info in self.wiring.views.items():
            for op in self.wiring.used_by.get(view, []):
                if info.leaf == leaf and op.outs[0] not in self.wiring.views:
                    return f": it goes into `{op.name}`"
        return ""


def kernel_atoms(axes: Axes, use: Use) -> tuple[list[Atom], list[Atom]]:
    """Atoms of the kept and of the contracted axes of a use's kernel, whether or not it is a plain matrix."""
    kernel = axes[use.op.ins[use.operand]]
    if use.op.name == "dot_general":
        sides = contraction(use.op)
        kept, summed = sides.free[use.operand], sides.contracted[use.operand]
    else:
        kernel_out, kernel_in, *_ = use.op.params["dimension_numbers"].rhs_spec
        kept, summed = (kernel_out,), (kernel_in,)
    return [a for d in kept for a in parts(kernel[d])], [a for d in summed for a in parts(kernel[d])]


def aligned(use: Use, order: Sequence[Atom]) -> Use:
    """The same use with its rows in the order of the given dimensions; scans and axes of length one come last."""
    position = {root(atom): i for i, atom in reversed(list(enumerate(order)))}
    ranks = [len(order) if atom is None else position[root(atom)] for atom in use.rows]
    by_rank = sorted(range(len(ranks)), key=ranks.__getitem__)
    rows = tuple(use.rows[i] for i in by_rank)
    layouts = (
        dataclasses.replace(layout, rows=tuple(layout.rows[i] for i in by_rank)) for layout in (use.inputs, use.outputs)
    )
    inputs, outputs = layouts
    return dataclasses.replace(use, rows=rows, inputs=inputs, outputs=outputs)


def _refusal(reason: str) -> tuple[str, tuple[Path, ...], dict[int, str], Norm | None]:
    return reason, (), {}, None


def _with_slot(layout: Layout, slot: int | None) -> Layout:
    return dataclasses.replace(layout, slot=slot)


def _refuse_integer_kernels(graph: Graph, uses: Sequence[Use], names: Sequence[str]) -> None:
    dtypes = dict(zip(names, (value.dtype for value in graph.params)))
    for use in uses:
        if not np.issubdtype(np.dtype(dtypes[use.leaf]), np.inexact) and not str(dtypes[use.leaf]).startswith(
            ("bf", "fl")
        ):
            raise ValueError(
                f"the kernel `{use.leaf}` has integer dtype {dtypes[use.leaf]}; make the parameters floats"
            )
