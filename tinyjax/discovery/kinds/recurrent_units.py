"""Recurrent units: a hidden state that one leaf both reads and writes, step after step.

h_t = sigma(x_t W + h_{t-1} U + b): a unit reads b_t = [x_t, h_{t-1}, 1] and acts on whatever reads h_t: U one step
later, and the readout. Its row of N is b_t [v_{t+1}, v^o_t]', so all that discovery must know is which state each
product reads at each of its steps. The loop may be a `scan` or written out, its input may be projected in advance.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tinyjax.core.kinds import RECURRENT_UNITS
from tinyjax.core.layout import Layout
from tinyjax.discovery.dimensions.dimensions import Dimensions
from tinyjax.discovery.dimensions.products import Product, leaf_factors
from tinyjax.discovery.dimensions.unification import Atom, root, roots
from tinyjax.discovery.graph.def_use import is_view
from tinyjax.discovery.graph.graph import ADDITIONS, Op, Scan, Value
from tinyjax.discovery.kinds.recurrent_states import NONE, Along, Held, States
from tinyjax.discovery.paths.path import Path, Verdict, readers
from tinyjax.discovery.paths.refusals import CannotGrow
from tinyjax.discovery.paths.slopes import mean_slope, step_of


@dataclasses.dataclass(frozen=True)
class RecurrentPath(Path):
    """The states that one sum of products makes, and the products that read them.

    The rows of all its uses are (samples, other axes, steps).

    Attributes:
        length: how many states there are for each row of the other axes.
        terms: the products that are summed, by leaf.
        reads: for each consumer, the state that it reads at each of its steps, -1 for one from elsewhere.
        measured: slope of a state in the sum, at 0; None where it is not finite.
    """

    length: int
    terms: Mapping[str, Product]
    reads: tuple[tuple[int, ...], ...]
    measured: float | None

    kind = RECURRENT_UNITS
    between = "a recurrence"

    def slope(self) -> float | None:
        """See `Path`."""
        return self.measured

    def recorded(self) -> list[Product]:
        """All products that are summed."""
        return [*self.terms.values()]


class Recurrence(NamedTuple):
    """A recurrent dimension.

    Attributes:
        paths: one for each sum of products.
        found: roles of the vectors along it, by leaf.
        seen: the operations in which leaves enter that are accounted for.
    """

    paths: tuple[RecurrentPath, ...]
    found: dict[int, str]
    seen: set[Op]


class _Sum(NamedTuple):
    """Products that are added up, each with what counts its steps, and the vectors added to them.

    `added` are all additions on the way.
    """

    value: Value
    terms: dict[str, tuple[Product, Along]]
    shifts: set[int]
    added: set[Op]


def find_recurrence(
    model: Dimensions, dimension: Atom, producers: Sequence[Product], consumers: Sequence[Product]
) -> Recurrence:
    """The sums of a recurrent dimension, and what reads their states.

    Raises:
        CannotGrow: with the reason.
    """
    for use in (*producers, *consumers):
        _require_plain(use, dimension)
    both = {use.leaf for use in producers} & {use.leaf for use in consumers}
    if len(both) > 1:
        raise CannotGrow(f"{len(both)} kernels write and read its states: cells with several cannot grow yet")
    if dimension.marks:
        raise CannotGrow(next(iter(dimension.marks)))
    sums = _sums(model, dimension, producers)
    biases = _biases(model, dimension, producers, sums)
    order = _order(model, *next(iter(sums[0].terms.values())))
    paths, read = [], set[Product]()
    reading: dict[Value, list[Product]] = {}
    for use in consumers:
        reading.setdefault(use.input_value, []).append(use)
    for one in sums:
        states = States(model, dimension, one.value, reading)
        read |= set(states.reads)
        if len({held.source for held in states.reads.values()}) > 1:
            raise CannotGrow("its consumers read different tensors")
        terms = {
            leaf: dataclasses.replace(_laid(use, along, order), bias=biases.get(leaf))
            for leaf, (use, along) in one.terms.items()
        }
        held = {use: found for use, found in states.reads.items() if set(found.steps) != {NONE}}
        _require_once(held)
        # What a product adds to the next state it does not add as a consumer with a bias of its own.
        laid = tuple(dataclasses.replace(_laid(use, found.along, order), bias=None) for use, found in held.items())
        if laid:
            reads = tuple(found.steps for found in held.values())
            above, below = next(iter(held.values())).near
            slope = mean_slope(above, below, step=step_of(one.value.dtype))
            first = next(iter(terms.values()))
            paths.append(RecurrentPath(first, laid, states.length, terms, reads, slope))
    for use in consumers:
        if use not in read and model.def_use.scalar(use.input_value) != 0:
            raise CannotGrow(f"`{use.leaf}` reads it where no state is made")
    seen = {use.op for use in (*producers, *consumers)} | {op for one in sums for op in one.added}
    return Recurrence(tuple(paths), dict.fromkeys(sums[0].shifts, "shift"), seen)


def _require_plain(use: Product, dimension: Atom) -> None:
    """Raises unless a use is one matrix product whose slots are rows or columns alone."""
    if use.refusal:
        raise CannotGrow(use.refusal)
    if use.window is not None:
        raise CannotGrow("it recurs through a convolution")
    if use.kernel.stack:
        raise CannotGrow("it recurs in every layer of a stack")
    sides = [
        [root(a) for f in layout.cols if (a := atoms[f]) is not None]
        for layout, atoms in ((use.inputs, use.input_atoms), (use.outputs, use.output_atoms))
    ]
    if any(dimension in side and side != [dimension] for side in sides):
        raise CannotGrow(f"`{use.leaf}` reads or makes its states together with another axis")


def _sums(model: Dimensions, dimension: Atom, producers: Sequence[Product]) -> list[_Sum]:
    """The products by the sums they end in."""
    def_use, sums = model.def_use, dict[Value, _Sum]()
    on_the_way, added = set[Value](), dict[Op, None]()
    for use in producers:
        (value,) = use.op.outs
        along: Along = use.op.scans[-1] if use.op.scans else None
        on_the_way.add(value)
        while len(users := def_use.used_by.get(value, [])) == 1:
            (user,) = users
            if user.name in ADDITIONS:
                added[user] = None
            elif not is_view(user):
                break
            elif user.name == "scan_in":
                along = _scanned(model, user)
            value = user.outs[0]
            on_the_way.add(value)
        one = sums.setdefault(value, _Sum(value, {}, set(), set()))
        if use.leaf in one.terms:
            raise CannotGrow(f"`{use.leaf}` is added to a state twice")
        one.terms[use.leaf] = use, along
    for op in added:
        end = _end(model, op, sums)
        sums[end].added.add(op)
        for value in op.ins:
            found = def_use.vector(value)
            if found is not None and [a for axis in model.axes[found[1]] for a in roots(axis)] == [dimension]:
                sums[end].shifts.add(found[0].leaf)
            elif value not in on_the_way:
                raise CannotGrow(f"its states are made of something else than products, in `{op.name}`")
    return list(sums.values())


def _scanned(model: Dimensions, op: Op) -> Along:
    """What counts the steps of a tensor that is read step by step in a scan."""
    found = roots(model.axes[op.ins[0]][0])
    return found[0] if len(found) == 1 else None


def _end(model: Dimensions, op: Op, ends: Mapping[Value, _Sum]) -> Value:
    """The sum that an addition belongs to."""
    (value,) = op.outs
    while value not in ends:
        value = model.def_use.used_by[value][0].outs[0]
    return value


def _biases(
    model: Dimensions, dimension: Atom, producers: Sequence[Product], sums: Sequence[_Sum]
) -> dict[str, Layout | None]:
    """The vectors added to the states, one for each of the first kernels."""
    leaves, shifts = list(dict.fromkeys(use.leaf for use in producers)), sorted(sums[0].shifts)
    if len(shifts) > len(leaves) or any(one.shifts != sums[0].shifts for one in sums):
        raise CannotGrow("its biases are not the same at all steps")
    layouts = []
    for leaf in shifts:
        atoms, sizes, numbers = leaf_factors(model.axes, model.graph.params[leaf])
        slots = tuple(f for f, a in enumerate(atoms) if a is not None)
        rest = tuple(f for f, a in enumerate(atoms) if a is None)
        layouts.append(Layout(model.names[leaf], sizes, numbers, None, (), rest, slots))
    return dict(zip(leaves, layouts))


def _order(model: Dimensions, use: Product, along: Along) -> list[Atom]:
    """The axes of a product besides its steps, the samples first."""
    others = [root(a) for a in use.rows if a is not None and not (isinstance(along, Atom) and root(a) is root(along))]
    samples = root(model.axes.samples)
    if len(set(others)) != len(others) or samples not in others:
        raise CannotGrow(f"the rows of `{use.leaf}` cannot be told apart")
    return [samples, *(a for a in others if a is not samples)]


def _laid(use: Product, along: Along, order: Sequence[Atom]) -> Product:
    """The use with its rows in the order (samples, other axes, steps)."""
    place = {atom: i for i, atom in enumerate(order)}
    ranks = []
    for factor, atom in zip(use.inputs.rows, use.rows):
        if factor < len(use.op.scans):
            steps = isinstance(along, Scan) and use.op.scans[factor] == along
            rank = len(order) + 1 if steps else None
        elif atom is None:
            rank = len(order)
        elif isinstance(along, Atom) and root(atom) is root(along):
            rank = len(order) + 1
        else:
            rank = place.get(root(atom))
        ranks.append(rank)
    if None in ranks or sorted(r for r in ranks if r < len(order)) != list(range(len(order))):
        raise CannotGrow(f"`{use.leaf}` has other rows than the states")
    by_rank = sorted(range(len(ranks)), key=lambda i: ranks[i])
    rows = tuple(use.rows[i] for i in by_rank)
    inputs, outputs = (
        dataclasses.replace(layout, rows=tuple(layout.rows[i] for i in by_rank)) for layout in (use.inputs, use.outputs)
    )
    return dataclasses.replace(use, rows=rows, inputs=inputs, outputs=outputs)


def _require_once(held: Mapping[Product, Held]) -> None:
    """Raises if a kernel reads a state more than once."""
    seen = set[tuple[str, int]]()
    for use, found in held.items():
        for step in found.steps:
            if step != NONE and (use.leaf, step) in seen:
                raise CannotGrow(f"`{use.leaf}` reads a state more than once")
            seen.add((use.leaf, step))


def recurs(model: Dimensions, dimension: Atom) -> bool:
    """Whether a leaf reads the dimension along one of its axes and writes it along another."""
    producers, consumers = model.producing.get(dimension, []), model.consuming.get(dimension, [])
    both = {use.leaf for use in producers} & {use.leaf for use in consumers}
    times = Counter(model.names[leaf] for leaf, _ in model.leaves[dimension])
    return any(times[leaf] > 1 for leaf in both)


def find_recurrent_units(model: Dimensions, dimension: Atom) -> Verdict:
    """The sums of a recurrent dimension and what reads them, or why it cannot grow."""
    producers, consumers = model.producing[dimension], model.consuming[dimension]
    try:
        found = find_recurrence(model, dimension, producers, consumers)
    except CannotGrow as refusal:
        return Verdict(f"{_how_it_recurs(model, producers, consumers)}, and {refusal}")
    for leaf, _ in model.leaves[dimension]:
        for op, _ in model.entries.get(leaf, ()):
            if op not in found.seen:
                return Verdict(f"`{model.names[leaf]}` also enters the model through `{op.name}`")
    leaves = list(dict.fromkeys(use.leaf for use in producers))
    terms = sorted((use for path in found.paths for use in path.recorded()), key=lambda use: leaves.index(use.leaf))
    return Verdict("", found.paths, terms, readers(found.paths), found.found)


def _how_it_recurs(model: Dimensions, producers: Sequence[Product], consumers: Sequence[Product]) -> str:
    """A recurrence takes several steps; a kernel that reads and writes once may be all of a residual block."""
    both = [use.leaf for use in producers if any(use.leaf == other.leaf for other in consumers)]
    steps = any(use.op.scans for use in (*producers, *consumers)) or len(set(both)) < len(both)
    return "it recurs" if steps else f"`{both[0]}` both reads and writes it"
