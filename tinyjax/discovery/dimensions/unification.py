"""Axes as products of atoms, with union-find: the algebra beneath discovery.

An axis of a tensor is an ordered product of `Atom`s. Operations make atoms equal (`unify`) or split them (a reshape).
Two atoms that were made equal have the same `root`; an atom keeps its own identity all the same, so that the axes of
a kernel can be followed through reshapes and transposes even when two of them turn out to be the same dimension.
"""

from collections.abc import Iterable, Sequence


class Atom:
    """A factor of an axis.

    Attributes:
        size: its length.
        marks: why the dimension cannot change its length, in words (read them at the root).
    """

    __slots__ = ("_halves", "_parent", "marks", "size")

    def __init__(self, size: int, mark: str | None = None):
        self.size = size
        self.marks: dict[str, None] = {mark: None} if mark else {}  # a dict keeps the order of discovery
        self._parent: Atom | None = None
        self._halves: tuple[Atom, Atom] | None = None


Axis = tuple[Atom, ...]


def root(atom: Atom) -> Atom:
    """The representative of all atoms made equal to this one."""
    while (parent := atom._parent) is not None:
        if parent._parent is not None:
            atom._parent = parent._parent  # a residual stream makes long chains: each search halves what it walks
        atom = parent
    return atom


def parts(axis: Iterable[Atom]) -> list[Atom]:
    """The atoms of an axis after all splits so far, in order, each with its own identity; ones left out."""
    found: list[Atom] = []
    for atom in axis:
        halves = _own_halves(atom)
        if halves is not None:
            found += parts(halves)
        elif atom.size != 1:
            found.append(atom)
    return found


def roots(axis: Iterable[Atom]) -> list[Atom]:
    """The representatives of the atoms of an axis, in order; ones left out."""
    return [root(atom) for atom in parts(axis)]


def mark(axis: Iterable[Atom], why: str) -> None:
    """Notes why every atom of the axis must keep its length."""
    for atom in roots(axis):
        atom.marks[why] = None


def unify(x: Iterable[Atom], y: Iterable[Atom], why: str = "a reshape that does not factor") -> None:
    """Makes two axes of the same length the same product of atoms; marks both where their factors do not nest."""
    x, y = tuple(x), tuple(y)
    while True:
        left, right = parts(x), parts(y)
        clash = next(((a, b) for a, b in zip(left, right) if a.size != b.size), None)
        if clash is None:
            if len(left) != len(right):
                break
            for a, b in zip(left, right):
                _link(a, b)
            return
        small, large = sorted(clash, key=lambda atom: atom.size)
        if large.size % small.size:
            break
        split(large, small.size)
    mark(x, why)
    mark(y, why)


def regroup(axis: Iterable[Atom], sizes: Sequence[int]) -> list[Axis] | None:
    """Cuts one long axis into axes of the given lengths (row-major), or None where the factors do not nest."""
    queue, axes = parts(axis), []
    for size in sizes:
        taken: list[Atom] = []
        left = size
        while left > 1:
            head = queue.pop(0)
            finer = parts([head])
            if len(finer) > 1:  # split meanwhile, through another atom of the same root
                queue[:0] = finer
            elif left % head.size == 0:
                taken.append(head)
                left //= head.size
            elif head.size % left == 0:
                split(head, left)
                queue[:0] = parts([head])
            else:
                return None
        axes.append(tuple(taken) or (Atom(1),))
    return axes


def split(atom: Atom, outer: int) -> None:
    """Splits an atom and all that equal it into `(outer, size // outer)`, row-major."""
    top = root(atom)
    first, second = Atom(outer), Atom(top.size // outer)
    first.marks, second.marks = dict(top.marks), dict(top.marks)
    top._halves = (first, second)


def _own_halves(atom: Atom) -> tuple[Atom, Atom] | None:
    top = root(atom)
    if atom._halves is None and top._halves is not None:
        first, second = Atom(top._halves[0].size), Atom(top._halves[1].size)
        first._parent, second._parent = top._halves
        atom._halves = (first, second)
    return atom._halves


def _link(a: Atom, b: Atom) -> None:
    a, b = root(a), root(b)
    if a is not b:
        b._parent = a
        a.marks.update(b.marks)
