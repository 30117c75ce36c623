"""Paths from a product to those that read it: the records that discovery hands to estimation."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.layout import Layout
from tinyjax.core.site import Norm, Stream
from tinyjax.core.windows import Window
from tinyjax.discovery.dimensions.products import Product
from tinyjax.discovery.graph.graph import MATMULS, Address, Op, Value


def _whole() -> float:
    return 1.0


class Tangent(NamedTuple):
    """The path of a slot from a product to its consumers.

    Attributes:
        ops: the operations on the way, in order.
        taps: for every operation that multiplies by a tensor from outside, by address, which operand that is.
        factors: for every operand that is a tapped tensor times a scale, which is 1 for a newborn, where it is tapped.
        scalars: for every other operand from outside, the number it holds everywhere.
        empty: what an empty slot holds, for every value on the way.
        producer: the product, its columns being heads and slots.
        slot: factor of the product's output that counts slots.
        read: the value it ends in.
        layout: of that value; its columns are (heads, offsets, slots).
        near: what a slot holds, for every value on the way, where the product is a little above 0 and a little below.
    """

    ops: tuple[Op, ...]
    taps: Mapping[Address, int]
    factors: Mapping[Value, Address]
    scalars: Mapping[Value, Any]
    empty: Mapping[Value, Any]
    producer: Product
    slot: int
    read: Value
    layout: Layout
    near: tuple[Mapping[Value, Any], Mapping[Value, Any]]

    @property
    def sign(self) -> float:
        """Of the slope, which what is carried along the path holds; 1 where there is none."""
        above, below = (float(side[self.read]) for side in self.near)
        return -1.0 if above < below else 1.0


class Branch(NamedTuple):
    """A writer of a stream on its way to one reader.

    Attributes:
        use: the product that writes; of a table, the operation by which its rows enter.
        rows: of a table that is added as it is (position embeddings, vectors), which of its rows every row of
            `use.outputs` takes; None elsewhere.
        tangent: what lies between writer and reader; None where the reader comes first.
    """

    use: Product
    rows: tuple[int, ...] | None
    tangent: Tangent | None

    @property
    def is_table(self) -> bool:
        """Whether rows are looked up instead of multiplied."""
        return self.use.op.name not in MATMULS


class Cell(NamedTuple):
    """How the states that one sum of products makes are made and read.

    The rows of all its uses are (samples, other axes, steps).

    Attributes:
        length: how many states there are for each row of the other axes.
        terms: the products that are summed, by leaf.
        reads: for each consumer of the path, the state that it reads at each of its steps, -1 for one from elsewhere.
        slope: of a state in the sum, at 0; None where it is not finite.
    """

    length: int
    terms: Mapping[str, Product]
    reads: tuple[tuple[int, ...], ...]
    slope: float | None


class Geometry(NamedTuple):
    """The windows of a path, over images of `space` pixels.

    Attributes:
        producer: window of the producer.
        consumer: window of the consumers.
        between: windows of the poolings between the two, in order.
        space: pixels of the producer's input.
        hidden: pixels of the consumers' input.
        out: pixels of the consumers' output.
    """

    producer: Window
    consumer: Window
    between: tuple[Window, ...]
    space: tuple[int, ...]
    hidden: tuple[int, ...]
    out: tuple[int, ...]


class Attention(NamedTuple):
    """The weights that a softmax makes of the scores, where they are found.

    Attributes:
        address: of the operation that reads them.
        operand: which operand of it.
        layout: of the weights, rows in the order of the scores.
    """

    address: Address
    operand: int
    layout: Layout


class QueryKey(NamedTuple):
    """What a path of queries and keys has besides the product that makes the queries.

    Attributes:
        key: the product that makes the keys, its kernel read with slots as rows.
        projected: the same product as it stands.
        queries: from the query's product to the scores.
        keys: from the key's product to the scores.
        sizes: samples, heads, queries a head, tokens of the queries, tokens of the keys.
        repeated: how often the keys of a head are repeated before the scores (1 or the queries a head).
        attention: the weights, None where they are not found.
        power: p where scores are multiplied by capacity^-p (1/2, or 1), which follows the capacity; 0 elsewhere.
    """

    key: Product
    projected: Product
    queries: Tangent
    keys: Tangent
    sizes: tuple[int, int, int, int, int]
    repeated: int
    attention: Attention | None
    power: float


class Replay(NamedTuple):
    """The operations between scores and the weights of the attention.

    Attributes:
        ops: in order.
        taps: by address, which operand comes from outside (a mask, a bias, dropout).
        scalars: for every other operand from outside, the number it holds everywhere.
        scores: the value they start from.
        weights: the value they end in.
    """

    ops: tuple[Op, ...]
    taps: Mapping[Address, int]
    scalars: Mapping[Value, Any]
    scores: Value
    weights: Value


class Head(NamedTuple):
    """What a site of whole heads has besides its values and outputs.

    Attributes:
        query: the product that makes the queries, its kernel with the query-key dimension as layers.
        key: the same of the keys.
        pair: the path of queries and keys to their scores.
        scores: layout of the scores, rows being samples, heads, tokens of the queries, tokens of the keys.
        replay: from scores to weights.
        attention: where the weights are read.
        values: the path from values to the outputs, columns being heads and value dimensions.
    """

    query: Product
    key: Product
    pair: QueryKey
    scores: Layout
    replay: Replay
    attention: Attention
    values: Tangent

    def taps(self) -> dict[Address, int]:
        """The operands to record, by address."""
        parts = (self.pair.queries.taps, self.pair.keys.taps, self.values.taps, self.replay.taps)
        return {address: operand for taps in parts for address, operand in taps.items()}


class RowFactorLayout(NamedTuple):
    """A factor of the rows of a path.

    Attributes:
        address: of the operation that reads it.
        operand: which operand of it.
        factor: from the recorded tensor to the factor.
        layout: of the recorded tensor, rows in the order of the producer's.
        shape: for every factor of the producer's rows its length, or 1 where the tensor does not depend on it.
        rows: for every factor of the producer's rows its length.
    """

    address: tuple[int, ...]
    operand: int
    factor: Callable[[Array], Array]
    layout: Layout
    shape: tuple[int, ...]
    rows: tuple[int, ...]

    def column(self, recorded: Array) -> Array:
        """The factor of every row, `(*stack, rows, 1)`."""
        matrix = self.layout.to_matrix(recorded)
        lead = matrix.shape[: len(self.layout.stack)]
        column = jnp.broadcast_to(matrix.reshape(*lead, *self.shape), (*lead, *self.rows))
        return self.factor(column.reshape(*lead, -1, 1))


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

    producer: Product
    consumers: tuple[Product, ...]
    geometry: Geometry | None = None
    weights: tuple[RowFactorLayout, ...] = ()
    gate: Product | None = None
    activation: Callable[[Array], Array] | None = None
    tangent: Tangent | None = None
    pair: QueryKey | None = None
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
        roles: of the vectors along it, by leaf.
        norm: its batch normalisation, or None.
        powers: see `Site`.
        stream: of a residual stream.
    """

    reason: str = ""
    paths: tuple[Path, ...] = ()
    producers: Sequence[Product] = ()
    consumers: Sequence[Product] = ()
    roles: Mapping[int, str] = MappingProxyType({})
    norm: Norm | None = None
    powers: tuple[tuple[str, float], ...] = ()
    stream: Stream | None = None


def readers(paths: Sequence[Path]) -> list[Product]:
    """The uses that read, path by path."""
    return [consumer for path in paths for consumer in path.consumers]


NONE = -1
"""A step at which something else than a state of this place is read: an initial state, another place."""
