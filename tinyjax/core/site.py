"""The record of one hidden dimension of a model, and the immutable collection of them.

A `Site` is static data (names, shapes, roles): it holds no array, hashes, and can be closed over by a jitted function.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import overload

from tinyjax.core import kinds
from tinyjax.core.layout import Layout


@dataclasses.dataclass(frozen=True)
class Member:
    """A leaf through which a hidden dimension runs, and what the leaf does to a neuron.

    Attributes:
        layout: where the slots lie in the leaf.
        role: `"fan_in"` (kernel of the producer), `"gate"` (kernel of its gate), `"fan_out"` (kernel of a consumer),
            `"shift"` (added: biases), `"scale"` (multiplies), `"mean"`, `"var"` (running statistics of a
            normalisation), `"counted"` (which slots a norm of `tinyjax.models` counts).
    """

    layout: Layout
    role: str

    @property
    def leaf(self) -> str:
        """Path of the leaf."""
        return self.layout.leaf


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A weight matrix on one side of a hidden dimension.

    Attributes:
        layout: the leaf as a matrix `(rows, cols)`; `slot` is a column factor of a producer, a row factor of a
            consumer.
        bias: the vector added to the matrix product, as a `Layout` whose `cols` match the kernel's; None without bias.
        positions: how often it multiplies for one sample: output pixels of a convolution, tokens, uses of a shared
            kernel.
    """

    layout: Layout
    bias: Layout | None = None
    positions: int = 1

    @property
    def leaf(self) -> str:
        """Path of the kernel's leaf."""
        return self.layout.leaf


@dataclasses.dataclass(frozen=True)
class Norm:
    """A batch normalisation between the producer and the activation, by the paths of its leaves.

    Attributes:
        scale: what the normalised channel is multiplied by.
        shift: what is added then.
        mean: the running mean, None without.
        var: the running variance, None without.
        epsilon: what is added to the variance.
    """

    scale: str
    shift: str
    mean: str | None
    var: str | None
    epsilon: float


@dataclasses.dataclass(frozen=True)
class Stream:
    """What a residual stream has besides its writers (the producers of its site) and readers (the consumers).

    Attributes:
        readers: of how many consumers in a row read the same tensor (queries, keys and values), in order.
        normed: whether a root-mean-square norm over the dimension lies before a reader: it sees what a neuron writes.
    """

    readers: tuple[int, ...]
    normed: bool


@dataclasses.dataclass(frozen=True)
class Site:
    """A hidden dimension of a model.

    A site inside a `scan` over layers has one capacity and one set of slots for all layers of the stack: slot j is free
    when it is free in every layer.

    Attributes:
        name: the producing module's path (`"params/"` left out), or the leaf's path where a module has several kernels.
        capacity: number of slots allocated (the size of the dimension).
        growable: whether neurons can be added here.
        reason: why not, in words; empty when growable.
        members: every leaf the dimension runs through.
        producers: kernels whose output is the dimension; of recurrent units several, whose products are added.
        consumers: kernels that contract it; a recurrent kernel is among both.
        stack: lengths of the enclosing scans over layers, outermost first; () for an ordinary site.
        norm: a batch normalisation on the way to the consumers, or None.
        powers: leaves, by path, that `resize` multiplies by a power of new / old capacity: they make up for numbers of
            the model that follow it (a root of a width in scores of attention, in a readout, in a norm).
        gate: the kernel whose activation multiplies the producer's output slot by slot (GLU, SwiGLU), or None.
        pattern: for a site of whole attention heads the kernels of queries and keys, its producer being that of the
            values; () elsewhere. Their layers (and the producer's) are the dimensions of a head.
        stream: of a residual stream, which has several producers; None elsewhere.
        fixed: what follows the capacity such that no leaf can make up for it, in words: the site grows inside its
            capacity, and `resize` and `compact` refuse to change that; "" where nothing does.
        unchecked: why that is not known: the loss could not be traced at another capacity; "" where it was.
        kind: one of `tinyjax.core.kinds`; "" where it cannot grow. As its kernels tell where it is not said.
    """

    name: str
    capacity: int
    growable: bool
    reason: str
    members: tuple[Member, ...]
    producers: tuple[Kernel, ...]
    consumers: tuple[Kernel, ...]
    stack: tuple[int, ...] = ()
    norm: Norm | None = None
    powers: tuple[tuple[str, float], ...] = ()
    gate: Kernel | None = None
    pattern: tuple[Kernel, ...] = ()
    stream: Stream | None = None
    fixed: str = ""
    unchecked: str = ""
    kind: str = ""

    def __post_init__(self) -> None:
        if self.growable and not self.kind:  # written down by hand, or by a version that did not know the word
            object.__setattr__(self, "kind", _kind(self))


def _kind(site: Site) -> str:
    """The kind of a site as far as its kernels tell: a convolution of single pixels is a hidden layer to them."""
    written, read = ({kernel.leaf for kernel in kernels} for kernels in (site.producers, site.consumers))
    found = {
        kinds.ATTENTION_HEADS: bool(site.pattern),
        kinds.RESIDUAL_STREAM: site.stream is not None,
        kinds.GATED_UNITS: site.gate is not None,
        kinds.RECURRENT_UNITS: bool(written & read),
        kinds.QUERY_KEY: any(member.role == "fan_in" and member.leaf in read for member in site.members),
        kinds.ATTENTION_VALUES: any(len(kernel.layout.stack) > len(site.stack) for kernel in site.producers),
        kinds.CONVOLUTION: any(len(kernel.layout.rows) > 1 for kernel in site.consumers),
    }
    return next((kind for kind, is_it in found.items() if is_it), kinds.HIDDEN_LAYER)


class Sites(Sequence[Site]):
    """The hidden dimensions of a model, in the order in which the model computes them.

    Indexed by position or by name; printing gives a table. `growable` keeps only the sites that can grow.
    """

    def __init__(self, sites: Iterable[Site]):
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, key: int | str) -> Site: ...
    @overload
    def __getitem__(self, key: slice) -> "Sites": ...
    def __getitem__(self, key: int | str | slice) -> "Site | Sites":
        if isinstance(key, slice):
            return Sites(self._sites[key])
        if isinstance(key, int):
            return self._sites[key]
        for site in self._sites:
            if site.name == key:
                return site
        raise KeyError(f"no site `{key}`; the sites are {', '.join(f'`{s.name}`' for s in self._sites) or 'none'}")

    def __len__(self) -> int:
        return len(self._sites)

    def __iter__(self) -> Iterator[Site]:
        return iter(self._sites)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sites) and self._sites == other._sites

    def __hash__(self) -> int:
        return hash(self._sites)

    @property
    def growable(self) -> "Sites":
        """The sites that can grow."""
        return Sites(site for site in self._sites if site.growable)

    @property
    def names(self) -> tuple[str, ...]:
        """Names in order."""
        return tuple(site.name for site in self._sites)

    def __repr__(self) -> str:
        rows = [("site", "capacity", "producer", "consumers", "growable")]
        rows += [
            (
                site.name,
                " x ".join(map(str, (*site.stack, site.capacity))),
                _brief([*site.pattern, *site.producers]) + ("" if site.gate is None else f" x {_brief([site.gate])}"),
                _brief(site.consumers),
                _verdict(site),
            )
            for site in self._sites
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join([*(c.ljust(w) for c, w in zip(row, widths)), row[4]]).rstrip() for row in rows)


def _verdict(site: Site) -> str:
    """Whether a site can grow, and beyond its capacity."""
    if not site.growable:
        return f"no: {site.reason}"
    return f"yes, inside its capacity: {site.fixed}" if site.fixed else "yes"


def _brief(kernels: Sequence[Kernel]) -> str:
    """The first two leaves and how many more there are."""
    names = [kernel.leaf.removeprefix("params/") for kernel in kernels]
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "") or "-"


def resized(sites: Iterable[Site], capacities: Mapping[str, int]) -> Sites:
    """The sites with the capacities of `capacities` (by name; others keep theirs), all layouts brought up to date.

    A kernel that lies between two sites is described in both: its factors are taken from the leaf's new shape.
    """
    sites = tuple(sites)
    factor_sizes = {}  # (leaf, axis, position within the axis) -> new size
    for site in sites:
        for member in site.members:
            slot = member.layout.slot
            assert slot is not None
            key = (member.leaf, member.layout.axes[slot], _position(member.layout, slot))
            factor_sizes[key] = capacities.get(site.name, site.capacity)

    def update(layout: Layout) -> Layout:
        factors = tuple(
            factor_sizes.get((layout.leaf, axis, _position(layout, f)), size)
            for f, (size, axis) in enumerate(zip(layout.factors, layout.axes))
        )
        return dataclasses.replace(layout, factors=factors)

    def update_kernel(kernel: Kernel) -> Kernel:
        bias = None if kernel.bias is None else update(kernel.bias)
        return dataclasses.replace(kernel, layout=update(kernel.layout), bias=bias)

    def update_site(site: Site) -> Site:
        producers, consumers = (tuple(map(update_kernel, kernels)) for kernels in (site.producers, site.consumers))
        return dataclasses.replace(
            site,
            capacity=capacities.get(site.name, site.capacity),
            members=tuple(Member(update(m.layout), m.role) for m in site.members),
            producers=producers,
            consumers=consumers,
            stack=_stack(consumers or producers),  # the heads of queries and keys are layers
            gate=None if site.gate is None else update_kernel(site.gate),
            pattern=tuple(map(update_kernel, site.pattern)),
        )

    return Sites(map(update_site, sites))


def _stack(kernels: Sequence[Kernel]) -> tuple[int, ...]:
    return tuple(kernels[0].layout.factors[f] for f in kernels[0].layout.stack) if kernels else ()


def _position(layout: Layout, factor: int) -> int:
    """Index of a factor among the factors of its axis."""
    return factor - layout.axes.index(layout.axes[factor])


def as_sites(sites: "Site | Iterable[Site]") -> Sites:
    """A `Sites` from one site, a sequence of sites, or a `Sites`."""
    if isinstance(sites, Sites):
        return sites
    if not isinstance(sites, Iterable | Site):
        raise ValueError(f"`sites` must be sites from `find_sites`, got {sites!r}")
    listed = (sites,) if isinstance(sites, Site) else tuple(sites)
    for site in listed:
        if not isinstance(site, Site):
            raise ValueError(f'`sites` must hold `Site`s, got {site!r}; take them from `find_sites`: `sites["w"]`')
    return Sites(listed)


def require_site(site: object) -> None:
    """Raises a ValueError for anything else than one site."""
    if isinstance(site, Site):
        return
    if isinstance(site, Sites):
        raise ValueError(f"`site` must be one `Site`, got {len(site)} `Sites`: pass them one by one, `sites[0]`")
    name = site if isinstance(site, str) else "w"
    raise ValueError(f'`site` must be a `Site`, got {site!r}; take it from `find_sites`: `sites["{name}"]`')
