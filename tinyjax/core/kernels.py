"""The kernels of a site as matrices, and what lies around them: biases, fan-ins, blocks."""

import itertools
import math
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from tinyjax.core.layout import Layout
from tinyjax.core.params import Params, require_leaves
from tinyjax.core.site import Kernel, Site, require_site


def matrices(params: Params, site: Site) -> tuple[Float[Array, "*L D C"], Float[Array, "*L H M"]]:
    """The producer's and the consumers' weights as matrices that multiply rows of inputs from the right.

    Args:
        params: the parameters the site was found in.
        site: a growable site.

    Returns:
        `weight_prev` `(*stack, D, capacity)`, the producers (several where their products are added) one below the
        other, bias as last row iff there is one; `weight` `(*stack, H, M)`, the consumers side by side in the order of
        `site.consumers`, bias as last row iff all of them have one. The producers of a residual stream each have a bias
        row of their own, and the consumers of each tensor a block of `weight`.

    Raises:
        ValueError: for a site that cannot grow, or consumers whose inputs have different sizes.

    Example:
        >>> weight_prev, weight = tinyjax.surgery.matrices(params, site)
        >>> weight_prev.shape, weight.shape
        ((5, 12), (13, 12))
    """
    require_growable(site)
    leaves = site_leaves(params, site)
    if len({rows(kernel) for kernel in site.consumers}) > 1:
        raise ValueError(
            f"the consumers of site `{site.name}` see it through windows of different sizes "
            f"({', '.join(f'`{k.leaf}`: {rows(k)} rows' for k in site.consumers)}): they have no common input matrix"
        )
    fans_in = [_fan_in_matrix(leaves, group) for group in writers(site)]
    blocks = []
    for group in readers(site):
        with_bias = have_bias(group)
        blocks.append(jnp.concatenate([_matrix(leaves, kernel, with_bias) for kernel in group], axis=-1))
    return jnp.concatenate(fans_in, axis=-2), block_diagonal(blocks)


def writers(site: Site) -> list[tuple[Kernel, ...]]:
    """The producers whose products are added in one place, with one bias: each alone in a residual stream."""
    return [site.producers] if site.stream is None else [(kernel,) for kernel in site.producers]


def producers_have_bias(site: Site) -> bool:
    """Whether a neuron's fan-in ends with a bias: in a residual stream every writer's part does for itself."""
    return site.stream is None and any(kernel.bias is not None for kernel in site.producers)


def num_inputs(site: Site) -> int:
    """Length of a neuron's fan-in, biases counted."""
    return sum(fan_in_size(group) for group in writers(site))


def fan_in_size(group: Sequence[Kernel]) -> int:
    """Length of the fan-in of producers whose products are added in one place, their bias counted."""
    return sum(rows(kernel) for kernel in group) + any(kernel.bias is not None for kernel in group)


def recurrent_leaves(site: Site) -> frozenset[str]:
    """Kernels that both write and read the dimension: their rows and their columns are slots."""
    return frozenset(k.leaf for k in site.producers) & frozenset(k.leaf for k in site.consumers)


def readers(site: Site) -> list[tuple[Kernel, ...]]:
    """The consumers that read the same tensor, tensor by tensor: all of them but for a residual stream."""
    sizes = (len(site.consumers),) if site.stream is None else site.stream.readers
    ends = list(itertools.accumulate(sizes))
    return [site.consumers[end - size : end] for size, end in zip(sizes, ends)]


def have_bias(group: Sequence[Kernel]) -> bool:
    """Whether the matrix of consumers that read one tensor has a bias row: all of them must have a bias."""
    return all(kernel.bias is not None for kernel in group)


def consumers_have_bias(site: Site) -> bool:
    """Whether the last row of the consumers' matrix is their bias: a residual stream has a row for each tensor read."""
    return site.stream is None and have_bias(site.consumers)


def block_diagonal(blocks: Sequence[Array]) -> Array:
    """Matrices `(..., h, m)` along the diagonal of one, zeros elsewhere."""
    if len(blocks) == 1:
        return blocks[0]
    below, beside = (sum(block.shape[axis] for block in blocks) for axis in (-2, -1))
    found = jnp.zeros((*blocks[0].shape[:-2], below, beside), jnp.result_type(*blocks))
    row = col = 0
    for block in blocks:
        height, breadth = block.shape[-2:]
        found = found.at[..., row : row + height, col : col + breadth].set(block)
        row, col = row + height, col + breadth
    return found


def rows(kernel: Kernel) -> int:
    """Number of rows of a kernel's matrix, without the bias."""
    return math.prod(kernel.layout.factors[f] for f in kernel.layout.rows)


def cols(kernel: Kernel) -> int:
    """Number of columns of a kernel's matrix."""
    return math.prod(kernel.layout.factors[f] for f in kernel.layout.cols)


def require_growable(site: Site) -> None:
    """Raises the reason why a site cannot grow, as a ValueError."""
    require_site(site)
    if not site.growable:
        raise ValueError(f"site `{site.name}` cannot grow: {site.reason}. Pass `sites.growable` to leave it out.")
    for producer in site.producers:
        if producer.layout.cols != (producer.layout.slot,):
            why = f"a slot is several columns of the producer `{producer.leaf}`"
            raise ValueError(f"site `{site.name}` cannot grow: {why}")


def is_normed(site: Site) -> bool:
    """Whether a norm sees what a new neuron writes: of residual streams alone."""
    return site.stream is not None and site.stream.normed


def gating_kernels(site: Site) -> tuple[Kernel, ...]:
    """The kernels that decide when a neuron acts, and that no amplitude scales: of the gate, of queries and keys."""
    return site.pattern if site.gate is None else (site.gate, *site.pattern)


def site_leaves(params: Params, site: Site) -> dict[str, Array]:
    """The leaves of a site by path, checked for presence, shape and dtype."""
    require_site(site)
    kernels = (*site.producers, *site.consumers, *gating_kernels(site))
    layouts: list[Layout] = [m.layout for m in site.members] + [k.layout for k in kernels]
    layouts += [k.bias for k in kernels if k.bias is not None]
    leaves = require_leaves(params, [layout.leaf for layout in layouts])
    for layout in layouts:
        leaf = leaves[layout.leaf]
        if leaf.shape != layout.shape:
            raise ValueError(
                f"leaf `{layout.leaf}` has shape {leaf.shape} where site `{site.name}` says {layout.shape}: "
                "these sites belong to another capacity. Use the sites that `resize` returned."
            )
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"leaf `{layout.leaf}` of site `{site.name}` is {leaf.dtype}: only floats can grow")
    return {name: jnp.asarray(leaf) for name, leaf in leaves.items()}


def _fan_in_matrix(leaves: Mapping[str, Array], group: Sequence[Kernel]) -> Array:
    """Producers one below the other, the sum of their biases as last row iff there is one."""
    fans_in = [kernel.layout.to_matrix(leaves[kernel.leaf]) for kernel in group]
    biases = [k.bias.to_matrix(leaves[k.bias.leaf]) for k in group if k.bias is not None]
    if biases:
        fans_in.append(sum(biases[1:], biases[0]))
    return jnp.concatenate(fans_in, axis=-2)


def _matrix(leaves: Mapping[str, Array], kernel: Kernel, with_bias: bool) -> Array:
    matrix = kernel.layout.to_matrix(leaves[kernel.leaf])
    if kernel.bias is None or not with_bias:
        return matrix
    return jnp.concatenate([matrix, kernel.bias.to_matrix(leaves[kernel.bias.leaf])], axis=-2)
