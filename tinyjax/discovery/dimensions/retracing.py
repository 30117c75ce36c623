"""Which numbers of a model follow a width: the loss traced again at other capacities, and its values compared.

All dimensions change at once, to capacities that equal no other size, so that a ratio tells which of them a number
follows; where the loss cannot be traced so, the set of dimensions is divided. A number that moves by a power of the
capacity is made up for by leaves where units allow it (`homogeneity`); any other keeps the site from being resized.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from tinyjax.core.kinds import ATTENTION_HEADS, QUERY_KEY, RESIDUAL_STREAM
from tinyjax.core.site import Site, Sites
from tinyjax.discovery.dimensions.axes import Axes
from tinyjax.discovery.dimensions.homogeneity import compensation
from tinyjax.discovery.dimensions.powers_of_widths import Trial, exponents
from tinyjax.discovery.dimensions.trace_differences import Folded, Structure, differences
from tinyjax.discovery.dimensions.unification import Atom, roots
from tinyjax.discovery.graph.flattening import flatten
from tinyjax.discovery.graph.graph import Graph
from tinyjax.discovery.graph.tracing import Trace

Retrace = Callable[[dict[str, int]], Trace]
"""The loss traced with other capacities of some sites, by name."""

FAILURES = 8
"""Traces that may fail before the sites left are given up."""

BLOCKS = 16
"""Groups of sites that are told apart where a value moves by no power of a capacity."""


class _Failed(NamedTuple):
    why: str
    structure: bool


def with_numbers(
    sites: Sites, traced: Trace, graph: Graph, axes: Axes, dimensions: Mapping[str, Atom], retrace: Retrace
) -> Sites:
    """The sites with what follows their capacity: `powers`, `fixed` and `unchecked`.

    Args:
        sites: the sites of a traced loss.
        traced: the loss.
        graph: its graph.
        axes: the axes of its tensors.
        dimensions: the dimension of every growable site, by name.
        retrace: traces the loss at other capacities.
    """
    names = traced.leaf_names
    model = _Model(sites.growable, traced, graph, axes, dimensions, retrace)
    fixed: dict[str, list[str]] = {}
    powers: dict[str, dict[tuple[int, int], Fraction]] = {}
    groups, unchecked = _groups(model)
    for group, first, second in groups:
        for name, what in first.torn.items():
            fixed.setdefault(name, []).append(what)
        others = []
        for place in {**first.moved, **second.moved}:
            follows = exponents(first, second, place)
            if follows is None:
                others.append(place)
            for name, power in (follows or {}).items():
                powers.setdefault(name, {})[place] = power
        for place, found in _followed(model, group, others).items():
            what = (first.moved.get(place) or second.moved[place]).what
            for name in found:
                fixed.setdefault(name, []).append(f"{what} follows its capacity")
    new = []
    for site in sites:
        if site.growable and site.name in unchecked:
            failed = unchecked[site.name]
            site = dataclasses.replace(site, **{"fixed": failed.why} if failed.structure else {"unchecked": failed.why})
        elif site.growable:
            known = powers.get(site.name, {})
            found = {} if not known or site.name in fixed else compensation(model.folded, _leaves(site, names), known)
            if found is None:
                places = {(d.op, d.operand): d for _, *trials in groups for t in trials for d in t.moved.values()}
                fixed[site.name] = [_power_in_words(places[place].what, power) for place, power in known.items()]
            scaled = tuple((names[leaf], float(power)) for leaf, power in (found or {}).items())
            site = dataclasses.replace(site, powers=scaled, fixed=_in_words(fixed.get(site.name, [])))
        new.append(site)
    return Sites(new)


def _power_in_words(what: str, power: Fraction) -> str:
    return f"{what} follows its capacity to the power {power}, on a way on which no leaf can make up for it"


def _in_words(found: Sequence[str]) -> str:
    found = list(dict.fromkeys(found))
    return "; ".join(found[:2]) + (f"; and {len(found) - 2} more" if len(found) > 2 else "")


def _leaves(site: Site, names: Sequence[str]) -> list[int]:
    """The leaves that may be multiplied when a site is resized, the preferred ones first.

    What reads a layer, what writes a residual stream (then the scales of its norms), the queries of queries and keys.
    """
    writers, readers = (
        [layout.leaf for kernel in kernels for layout in (kernel.layout, kernel.bias) if layout is not None]
        for kernels in (site.producers, site.consumers)
    )
    rest = [m.leaf for m in site.members if m.leaf not in readers]
    first = [*writers, *rest] if site.kind in (RESIDUAL_STREAM, QUERY_KEY) else []
    return [names.index(leaf) for leaf in dict.fromkeys([*first, *readers, *writers, *rest])]


def _kind(site: Site) -> str:
    """Whole heads, residual streams, queries and keys, all others."""
    return site.kind if site.kind in (ATTENTION_HEADS, RESIDUAL_STREAM, QUERY_KEY) else ""


class _Model:
    """A traced loss, its sites that can grow, and trials at other capacities."""

    def __init__(
        self,
        sites: Sites,
        traced: Trace,
        graph: Graph,
        axes: Axes,
        dimensions: Mapping[str, Atom],
        retrace: Retrace,
    ):
        self.sites, self._graph, self._axes, self._retrace = sites, graph, axes, retrace
        self._names = {dimension: name for name, dimension in dimensions.items()}
        self._known: tuple[dict[Any, int], list[Any]] = {}, []
        self.folded = Folded(flatten(traced, merge=False), *self._known)
        self._sizes = {n for op in graph.ops for v in op.outs for n in v.shape}

    def capacities(self, names: Sequence[str], ladder: int) -> dict[str, int]:
        """Other capacities: primes (ladders 0 and 1), multiples of the present ones (2, 3), the next ones (4, 5).

        They equal no other size. Of many sites of a kind (one a layer) several have the same, such that layers are
        traced once for all of them; no two sites have the same on an even ladder and on the odd one after it.
        """
        alike: dict[Any, list[str]] = {}
        for name in names:
            alike.setdefault((_kind(self.sites[name]), self.sites[name].capacity), []).append(name)
        taken, found = set(self._sizes), {}
        for (_, capacity), members in alike.items():
            base = len(members) if len(members) <= 4 else math.isqrt(len(members) - 1) + 1
            chosen: dict[int, int] = {}
            for i, name in enumerate(members):
                digit = i % base if ladder % 2 else i // base
                digit = i if base == len(members) else digit
                if digit not in chosen:
                    ways = _primes(int(capacity * (1.25, 1.75)[ladder % 2]) + 2)
                    if ladder > 1:
                        ways = (capacity * m for m in _primes((2, 5)[ladder % 2]))
                    if ladder > 3:
                        ways = itertools.count(capacity + 1 + ladder % 2)
                    chosen[digit] = next(n for n in ways if n not in taken)
                    taken.add(chosen[digit])
                found[name] = chosen[digit]
        return found

    def trial(self, capacities: Mapping[str, int]) -> Trial | _Failed:
        """The loss at other capacities of some sites."""
        try:
            traced = self._retrace(dict(capacities))
        except Exception as error:  # whatever a model says to leaves of other shapes
            said = str(error).strip().partition("\n")[0][:160]
            return _Failed(f"the loss cannot be traced at another capacity ({type(error).__name__}: {said})", False)
        new = Folded(flatten(traced, merge=False), *self._known)
        found = differences(self.folded, new)
        if isinstance(found, Structure):
            return _Failed(f"the loss is another program at another capacity, from {found.what} on", True)
        logs = {name: math.log(n / self.sites[name].capacity) for name, n in capacities.items()}
        return Trial(logs, {(d.op, d.operand): d for d in found}, self._torn(flatten(traced), capacities))

    def _torn(self, new: Graph, capacities: Mapping[str, int]) -> dict[str, str]:
        """Tensors that do not have the sizes which their axes say: the model fixes a size of its own."""
        torn: dict[str, str] = {}
        if [op.name for op in self._graph.ops] != [op.name for op in new.ops]:
            return torn  # the axes may come in another order
        for a, b in zip(self._graph.ops, new.ops):
            for x, y in zip(a.outs, b.outs):
                for axis, size in zip(self._axes[x], y.shape):
                    atoms = roots(axis)
                    here = {atom: self._names[atom] for atom in atoms if self._names.get(atom) in capacities}
                    want = math.prod(capacities[here[atom]] if atom in here else atom.size for atom in atoms)
                    for name in here.values() if want != size else ():
                        said = f"`{a.name}` gives shape {list(y.shape)} for {list(x.shape)} at {capacities[name]} slots"
                        torn.setdefault(name, f"{said}: the model keeps a size of its own")
        return torn


def _primes(start: int) -> Iterator[int]:
    return (n for n in itertools.count(start) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def _groups(model: _Model) -> tuple[list[tuple[list[str], Trial, Trial]], dict[str, _Failed]]:
    """Sets of sites with two trials of each, and the sites that no trial could change, with the reason."""
    done, failed = [], {}
    queue, failures = [list(model.sites.names)] if model.sites else [], 0
    while queue:
        names = queue.pop(0)
        found, ladder, other = model.trial(model.capacities(names, 0)), 0, None
        while isinstance(found, _Failed) and ladder < (4 if found.structure else 2):
            other = found if found.structure else other
            ladder += 2
            found = model.trial(model.capacities(names, ladder))
        found = other or found  # a program that is the same at some capacities and another at others
        parts = _divided(model, names, found) if len(names) > 1 and failures < FAILURES else []
        failures += bool(parts)
        if parts:
            queue += parts
        elif isinstance(found, Trial):
            shared = len(set(found.logs.values())) < len(names)
            again = model.trial(model.capacities(names, ladder + 1)) if found.moved or shared else found
            done.append((names, found, again if isinstance(again, Trial) else found))
        else:
            failed |= dict.fromkeys(names, found)
    return done, failed


def _divided(model: _Model, names: list[str], found: Trial | _Failed) -> list[list[str]]:
    """A set of sites in parts where it cannot be told as it is: by their kind, else in halves."""
    if isinstance(found, Trial) and not found.torn:
        return []
    kinds: dict[str, list[str]] = {}
    for name in names:
        site = model.sites[name]
        kinds.setdefault(_kind(site), []).append(name)
    if len(kinds) > 1:
        return list(kinds.values())
    if isinstance(found, Trial):
        whole = [name for name in names if name not in found.torn]
        return [whole, list(found.torn)] if whole else []
    return [names[: len(names) // 2], names[len(names) // 2 :]]


def _followed(model: _Model, names: list[str], places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], list[str]]:
    """Which sites values follow that move by no power of a capacity.

    Half of the sites change in each of a few trials, so that every site has a pattern of its own.
    """
    if not places or len(names) == 1:
        return dict.fromkeys(places, names)
    size = -(-len(names) // BLOCKS)
    blocks = [names[i : i + size] for i in range(0, len(names), size)]
    found = {place: set(range(len(blocks))) for place in places}
    for bit, side in itertools.product(range((len(blocks) - 1).bit_length()), (0, 1)):
        chosen = {b for b in range(len(blocks)) if (b >> bit & 1) == side}
        trial = model.trial(model.capacities([name for b in sorted(chosen) for name in blocks[b]], 0))
        if isinstance(trial, Trial):
            for place in places:
                found[place] -= set() if place in trial.moved else chosen
    return {place: [name for b in sorted(left) for name in blocks[b]] for place, left in found.items()}
