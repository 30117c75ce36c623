"""What neurons and batches cost: parameter counts from the site records, and the paper's batch-size rules (app. E)."""

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from tinyjax.core.site import Site, Sites, as_sites, resized

TRAINED = ("fan_in", "gate", "fan_out", "shift", "scale")
"""Roles that count as parameters; running statistics do not."""


def parameters(sites: Iterable[Site] | Site, widths: Mapping[str, int]) -> int:
    """Number of parameters in the leaves that the sites run through, at the given widths.

    Args:
        sites: the network's sites.
        widths: used slots by site name; others count at capacity.

    Returns:
        The count; leaves that no site touches are not in it.

    Example:
        >>> costs.parameters(sites, {"hidden_1": 4, "hidden_2": 4})  # 5 x 4 + 5 x 4 + 4 x 2
        48
    """
    sizes = {}
    for site in resized(as_sites(sites), widths):
        sizes |= {m.leaf: math.prod(m.layout.shape) for m in site.members if m.role in TRAINED}
    return sum(sizes.values())


def parameter_cost(sites: Iterable[Site] | Site) -> Callable[[str, Mapping[str, int]], int]:
    """Cost function for `most_gain`: parameters that one more neuron adds at a site, at the current widths.

    Args:
        sites: the network's sites.

    Returns:
        `(site, widths) -> parameters`.

    Example:
        >>> costs.parameter_cost(sites)("hidden_1", {"hidden_1": 4, "hidden_2": 4})
        9
    """
    return partial(_one_more, parameters, as_sites(sites))


def forward_flops(sites: Iterable[Site] | Site, widths: Mapping[str, int]) -> int:
    """Floating-point operations of the products that the sites run through, for one sample, at the given widths.

    Two a multiply-add, forward pass alone; a training step costs about three times as much. What a `remat` repeats, and
    all that is not a product with one of these kernels, is left out.

    Args:
        sites: the network's sites, found at the size of the samples that are counted for.
        widths: used slots by site name; others count at capacity.

    Example:
        >>> costs.forward_flops(sites, {"hidden_1": 4, "hidden_2": 4})  # 2 (4 x 4 + 4 x 4 + 4 x 2)
        80
    """
    products = {}
    for site in resized(as_sites(sites), widths):
        products |= {
            k.leaf: 2 * math.prod(k.layout.shape) * k.positions
            for k in (*site.producers, *site.consumers, *site.pattern)
        }
    return sum(products.values())


def flop_cost(sites: Iterable[Site] | Site) -> Callable[[str, Mapping[str, int]], int]:
    """Cost function for `most_gain`: operations that one more neuron adds at a site, see `forward_flops`.

    Args:
        sites: the network's sites.

    Returns:
        `(site, widths) -> operations a sample`.

    Example:
        >>> costs.flop_cost(sites)("hidden_1", {"hidden_1": 4, "hidden_2": 4})
        16
    """
    return partial(_one_more, forward_flops, as_sites(sites))


def _one_more(
    total: Callable[[Sites, Mapping[str, int]], int], sites: Sites, name: str, widths: Mapping[str, int]
) -> int:
    """What one more neuron at a site adds to a total."""
    return total(sites, {**widths, name: widths[name] + 1}) - total(sites, widths)


def estimation_batch(
    channels: int, *, kernel_area: int, positions: int, training_set: int, constant: float = 1e-3
) -> int:
    r"""Samples to estimate new neurons from, so that their variance stays the same while the network grows (E.1).

    $n = c (S W)^2 / P \cdot 2^\kappa$ with $\kappa = \sqrt{32 \cdot 32 / P}$, rounded up, at least so many that there
    are more data points nP than inputs SW + 1, at most the training set. S is the kernel's *area*: raw values then run
    from 0.65 to 339,739 over the paper's network.

    Args:
        channels: W, inputs channels of the widened layer.
        kernel_area: S, 9 for a 3x3 kernel, 1 for a dense layer.
        positions: P, output positions of the widened layer, 1 for a dense layer. kappa is fitted to images of 32x32:
            small P means a large factor.
        training_set: number of samples there are.
        constant: c, 0.001 for figure 5, 0.01 for figure 8.

    Returns:
        Number of samples.

    Raises:
        ValueError: for a size below 1 or a constant that is not positive.

    Example:
        >>> costs.estimation_batch(256, kernel_area=9, positions=64, training_set=50_000)
        1328
    """
    sizes = {"channels": channels, "kernel_area": kernel_area, "positions": positions, "training_set": training_set}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}")
    if not constant > 0:
        raise ValueError(f"`constant` must be positive, got {constant}")
    inputs = kernel_area * channels
    # min first: 2^kappa reaches 2^32 for a single position
    n = min(constant * inputs**2 / positions * 2 ** math.sqrt(32 * 32 / positions), float(training_set))
    at_least = (inputs + 1) // positions + 1
    return min(max(math.ceil(n), at_least), training_set)


def learning_batch(complexity: float, *, initial_complexity: float, initial_batch: int = 32) -> int:
    r"""Batch size for gradient descent, growing as the square root of the model's complexity (E.2).

    $b_{t+1} = b_t \sqrt{C_{t+1} / C_t}$, that is $b_t = b_0 \sqrt{C_t / C_0}$, rounded only here.

    Args:
        complexity: C_t, number of parameters now.
        initial_complexity: C_0.
        initial_batch: b_0.

    Returns:
        Number of samples, at least 1.

    Raises:
        ValueError: for a complexity or batch that is not positive.

    Example:
        >>> costs.learning_batch(400_000, initial_complexity=100_000)
        64
    """
    for name, value in {
        "complexity": complexity,
        "initial_complexity": initial_complexity,
        "initial_batch": initial_batch,
    }.items():
        if not value > 0:
            raise ValueError(f"`{name}` must be positive, got {value}")
    return max(1, round(initial_batch * math.sqrt(complexity / initial_complexity)))
