"""What every kind of site says of a way through it, and what discovery says of a dimension.

A kind has a `Path` of its own, in the file of `discovery/kinds` that is named after it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple

from tinyjax.core.site import Norm, Stream
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.graph import Address


@dataclasses.dataclass(frozen=True)
class Path:
    """One way through a site: a product that writes the dimension and the products that read it.

    Attributes:
        producer: the use that writes; the first, where several are added.
        consumers: the uses that read, their rows in the order of the producer's.
        kind: of the site, one of `tinyjax.core.kinds`.
        between: what lies between producer and consumers, in words.
        signed: whether the rows that are summed carry the sign of the slope already.
    """

    producer: Product
    consumers: tuple[Product, ...]

    kind: ClassVar[str]
    between: ClassVar[str]
    signed: ClassVar[bool] = False

    def slope(self) -> float | None:
        """How much of what an empty slot makes arrives at the consumers, beyond what the rows hold; None: unknown."""
        return 1.0

    def recorded(self) -> Sequence[Product]:
        """The uses, besides the consumers, whose inputs the rows are made of."""
        return [self.producer]

    def taps(self) -> dict[Address, int]:
        """The other operands to record, by address."""
        return {}


class Verdict(NamedTuple):
    """What is said of a dimension.

    Attributes:
        reason: why it cannot grow, "" if it can.
        paths: the ways through it, none where it cannot.
        producers: the uses of the kernels that write it.
        consumers: the uses of the kernels that read it.
        roles: of the vectors along it, by leaf.
        norm: its batch normalisation, or None.
        powers: see `Site`.
        gates: of gated units, the products of their gates.
        pattern: of whole heads, the products that make their queries and keys.
        stream: of a residual stream.
    """

    reason: str = ""
    paths: Sequence[Path] = ()
    producers: Sequence[Product] = ()
    consumers: Sequence[Product] = ()
    roles: Mapping[int, str] = MappingProxyType({})
    norm: Norm | None = None
    powers: tuple[tuple[str, float], ...] = ()
    gates: Sequence[Product] = ()
    pattern: Sequence[Product] = ()
    stream: Stream | None = None


def readers(paths: Sequence[Path]) -> list[Product]:
    """The uses that read, path by path."""
    return [consumer for path in paths for consumer in path.consumers]
