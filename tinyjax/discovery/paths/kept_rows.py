"""Whether the rows of a value are still those of the product it follows, and why not.

Statistics over rows may meet the rows they are of only to normalise them: shift and scale, from degree 1 to 0.
"""

import math
from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

from tinyjax.discovery.dimensions.primitives import is_elementwise
from tinyjax.discovery.graph.graph import Op, Value
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS
from tinyjax.discovery.paths.dataflow import Dataflow
from tinyjax.discovery.paths.degrees import Degrees
from tinyjax.discovery.paths.poolings import Poolings, is_pooling
from tinyjax.discovery.paths.row_factors import RowFactors

ROW_BY_ROW = ""


class KeptRows(NamedTuple):
    """What has become of the rows of a product.

    Attributes:
        mixing: for every value that follows the product, why its rows are no longer the product's (`ROW_BY_ROW`, the
            empty string, where they are).
        modulated: operations in which rows met a summary of themselves.
        normalised: those of them that left degree 0.
        summaries: number of entries of every such summary; the number of slots for a statistic over all rows.
    """

    mixing: Mapping[Value, str]
    modulated: Sequence[Op]
    normalised: Sequence[Op]
    summaries: Set[int]


def find_kept_rows(flow: Dataflow, poolings: Poolings, degrees: Degrees, factors: RowFactors) -> KeptRows:
    """Of every value that follows a product, why its rows are no longer the product's."""
    mixing: dict[Value, str] = dict.fromkeys(flow.starts, ROW_BY_ROW)
    modulated, normalised, summaries = list[Op](), list[Op](), set[int]()
    for op, inside, outs in flow.steps:
        earlier = [mixing[v] for v in inside]
        if op.name == "scan_carry":
            why = "it is carried from one step of a scan to the next"
        elif op.name in KNOWN_FUNCTIONS or is_elementwise(op):
            why = next((reason for reason in earlier if reason != ROW_BY_ROW), ROW_BY_ROW)
            if op in factors.opaque:
                why = why or f"its rows are weighted one by one in `{op.name}`"
            if why == ROW_BY_ROW and len({len(poolings.before[v]) for v in inside}) > 1:
                modulated.append(op)
                chains = sorted((poolings.before[v] for v in inside), key=len)
                # A mean over pixels and then over samples is one over both; a pooling before is a summary of its own.
                summaries |= {math.prod(pool.outs[0].shape) for pool in (*chains[0], chains[-1][-1])}
                degree = degrees.of.get(outs[0])
                if op.name in ("mul", "div") and degree == 0:
                    normalised.append(op)
                elif op.name != "sub" or degree != 1:
                    why = f"its rows meet a summary of themselves in `{op.name}`"
        else:
            why = earlier[0] if is_pooling(flow.def_use, op) else f"its rows are mixed by `{op.name}`"
        if op in factors.twofold:
            why = why or f"its rows are weighted in two ways before `{op.name}`"
        mixing.update(dict.fromkeys(outs, why))
    return KeptRows(mixing, modulated, normalised, summaries)
