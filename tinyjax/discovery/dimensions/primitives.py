"""JAX's primitives by what they do to axes, what a product contracts, and what marks an axis."""

import math
from typing import NamedTuple

from tinyjax.discovery.dimensions.unification import Atom, Axis, roots
from tinyjax.discovery.graph.def_use import is_layout
from tinyjax.discovery.graph.graph import Op
from tinyjax.discovery.graph.known_functions import UNIT_DROPOUT

ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e bitcast_convert_type cbrt ceil
    clamp convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igammac imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not
    optimization_barrier or polygamma population_count pow real reduce_precision regularized_incomplete_beta rem round
    rsqrt select_n sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square
    stop_gradient sub tan tanh xor""".split()
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor argmax argmin".split()
)
RANDOM = frozenset(
    """random_bits random_seed random_fold_in random_split random_clone random_wrap random_unwrap random_gamma
    threefry2x32 rng_bit_generator rng_uniform""".split()
) | {UNIT_DROPOUT}
# These keep the rank and leave every axis alone but the ones they work along.
ALONG = frozenset(
    "cumsum cumprod cummax cummin cumlogsumexp rev sort slice split dynamic_slice dynamic_update_slice pad".split()
)

INPUT = "it is an input of the model"
JOINED = "it is a concatenation"
SAMPLES = "it counts the samples of the batch"
SHARED_HEADS = "it counts queries that share a head of keys: no whole one is added, its dimensions can grow"
BETWEEN_ACTIVATIONS = "it pairs two activations"


def is_elementwise(op: Op) -> bool:
    """Whether every entry of the results is made from the entries at the same place, or copied to several."""
    return op.name in ELEMENTWISE or op.name == "scan_out" or is_layout(op)


class Contraction(NamedTuple):
    """The axes of a matrix product or convolution, each side in the order of the contraction.

    Attributes:
        contracted: for (left, right) operand, the axes summed over.
        free: for (left, right) operand, the axes kept, in the order of the output.
        batched: for (left, right) operand, the axes paired without summing.
    """

    contracted: tuple[tuple[int, ...], tuple[int, ...]]
    free: tuple[tuple[int, ...], tuple[int, ...]]
    batched: tuple[tuple[int, ...], tuple[int, ...]]


def contraction(op: Op) -> Contraction:
    """How a `dot_general` divides the axes of its operands."""
    (left, right), (left_batch, right_batch) = op.params["dimension_numbers"]
    free = tuple(
        tuple(d for d in range(len(value.shape)) if d not in (*summed, *paired))
        for value, summed, paired in zip(op.ins, (left, right), (left_batch, right_batch))
    )
    return Contraction((tuple(left), tuple(right)), (free[0], free[1]), (tuple(left_batch), tuple(right_batch)))


def sample_blocks(axis: Axis) -> tuple[int, Axis] | None:
    """An axis as blocks that each count the same samples: how many blocks, and a block; None for any other axis."""
    found = roots(axis)
    first = next((i for i, atom in enumerate(found) if SAMPLES in atom.marks), None)
    return None if first is None else (size_of(found[:first]), tuple(found[first:]))


def has_views(axis: Axis) -> bool:
    """Whether an axis is a concatenation of the samples with themselves or others like them (two views)."""
    blocks = sample_blocks(axis)
    return blocks is not None and any(JOINED in atom.marks for atom in roots(axis)[: -len(blocks[1])])


def size_of(axis: Axis | list[Atom]) -> int:
    """The length of an axis."""
    return math.prod(atom.size for atom in axis)
