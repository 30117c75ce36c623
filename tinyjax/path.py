"""A way through a site, as discovery leaves it for those who sum along it."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jaxtyping import Array

from tinyjax.attention import Head
from tinyjax.bilinear import Pair
from tinyjax.geometry import Geometry
from tinyjax.recurrence import Cell
from tinyjax.rowweights import RowWeight
from tinyjax.site import Norm, Stream
from tinyjax.stream import Branch
from tinyjax.tangent import Tangent
from tinyjax.uses import Use


def _whole() -> float:
    return 1.0


class Path(NamedTuple):
    """One way through a site: a product that writes the dimension and the products that read it.

    Attributes:
        producer: the use that writes.
        consumers: the uses that read, their rows in the order of the producer's.
        geometry: how rows are pixels of images, or None where all of them are the same rows.
        weights: what every row was multiplied by between the two.
        gate: the product whose activation multiplies the producer's slot by slot, rows in the same order, or None.
        activation: elementwise, of the gate; where there is none, of the producer's own output on its way to the
            consumers, or None if more than elementwise operations lie there.
        pair: the keys, where the producer makes queries and the consumer is the product of both.
        cell: of recurrent units, what the producer is added to and which of its results the consumers read, or None.
        tangent: what lies between the two where rows are mixed or slots come in heads; None where rows are kept.
        head: queries, keys and what becomes of them, where a slot is a whole attention head; the producer makes values.
        branches: of a residual stream, all its writers on their way to the consumers, which read one tensor.
        slope: measures how much of what the producer makes in an empty slot arrives at the consumers, see
            `slope_at_empty`; 1 where the rows that are summed hold it already.
    """

    producer: Use
    consumers: tuple[Use, ...]
    geometry: Geometry | None = None
    weights: tuple[RowWeight, ...] = ()
    gate: Use | None = None
    activation: Callable[[Array], Array] | None = None
    tangent: Tangent | None = None
    pair: Pair | None = None
    cell: Cell | None = None
    head: Head | None = None
    branches: Sequence[Branch] = ()
    slope: Callable[[], float | None] = _whole

    def taps(self) -> dict[tuple[int, ...], int]:
        """The operands to record besides those of the uses, by address."""
        weights = {weight.address: weight.operand for weight in self.weights}
        taps = dict(weights) | ({} if self.head is None else self.head.taps())
        tangents: list[Tangent | None] = [] if self.pair is None else [self.pair.queries, self.pair.keys]
        tangents += [self.tangent, *(branch.tangent for branch in self.branches)]
        for tangent in tangents:
            taps |= {} if tangent is None else tangent.taps
        if self.pair is not None and self.pair.attention is not None:
            taps[self.pair.attention.address] = self.pair.attention.operand
        return taps


class Verdict(NamedTuple):
    """What is said of a dimension.

    Attributes:
        reason: why it cannot grow, "" if it can.
        paths: the ways through it, none where it cannot.
        producers: the uses of the kernels that write it.
        consumers: the uses of the kernels that read it.
        roles: of the vectors met on the way, by leaf.
        norm: its batch normalisation, or None.
        powers: see `Site`.
        stream: of a residual stream.
    """

    reason: str = ""
    paths: tuple[Path, ...] = ()
    producers: Sequence[Use] = ()
    consumers: Sequence[Use] = ()
    roles: Mapping[int, str] = MappingProxyType({})
    norm: Norm | None = None
    powers: tuple[tuple[str, float], ...] = ()
    stream: Stream | None = None


def readers(paths: Sequence[Path]) -> list[Use]:
    """The uses that read, path by path."""
    return [consumer for path in paths for consumer in path.consumers]
