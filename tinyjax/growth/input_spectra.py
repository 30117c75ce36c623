"""What growths on the same samples share: the second moment S of the data itself.

The first layer of a network reads the data, which no parameter changes. On one fixed batch its S, and everything that
follows from S alone, is the same at every growth.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxtyping import Array

from tinyjax.core.params import Params
from tinyjax.core.site import Site, Sites, as_sites
from tinyjax.discovery.kinds.convolution import ConvolutionPath
from tinyjax.discovery.kinds.hidden_layer import HiddenPath
from tinyjax.discovery.paths.path import Path
from tinyjax.discovery.sites import Discovery
from tinyjax.discovery.traced_loss import TracedLoss
from tinyjax.estimation.estimator import estimate_batch
from tinyjax.growth.batch_split import split_batch
from tinyjax.statistics.spectra import Spectra, decompose


class Inputs(NamedTuple):
    """The second moment of an input that no parameter changes.

    Attributes:
        gram_prev: (2, D, D) S of the even and of the odd samples, raw sums.
        spectra: its eigenvectors, and those of the mean.
    """

    gram_prev: Array
    spectra: Spectra


def decompose_inputs(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: Any,
    sites: Site | Sequence[Site],
    *,
    has_aux: bool = False,
) -> dict[str, Inputs]:
    """S of the sites whose producer reads the data itself, decomposed once for all growths on this batch.

    Pass it to `grow_step` as `inputs`, always with the same batch: growths of those sites then sum and factor no S.
    It costs two or three growths without it. Pure: `jit` it, then what follows from parameters is not computed.

    Args:
        loss_fn: `loss_fn(params, batch) -> loss`.
        params: the parameters; only their shapes matter.
        batch: the batch that the growths will look at.
        sites: growable sites, from `find_sites`.
        has_aux: whether `loss_fn` returns `(loss, aux)`.

    Returns:
        A record by site name; sites whose input depends on parameters, or that are stacks of layers, are left out.

    Raises:
        ValueError: as `estimate` and `make_grow_step`.

    Example:
        >>> decompose = jax.jit(partial(tinyjax.growth.decompose_inputs, loss_fn, sites=sites.growable))
        >>> inputs = decompose(params, batch)
        >>> grow_step = tinyjax.make_grow_step(loss_fn, sites.growable, num_neurons=4)
        >>> params, info = grow_step(params, batch, inputs=inputs)
    """
    samples, _ = split_batch(batch)
    loss = TracedLoss(loss_fn, has_aux)
    discovery = loss.discover(params, samples)
    constant = Sites(site for site in as_sites(sites) if _reads_only_data(discovery, site))
    if not constant:
        return {}
    found = estimate_batch(loss, params, samples, constant).statistics
    return {name: Inputs(s.gram_prev, decompose(s.gram_prev, s.count)) for name, s in found.items()}


def _reads_only_data(discovery: Discovery, site: Site) -> bool:
    """Whether no parameter reaches the producer's input, nor what its rows are multiplied by."""
    paths = discovery.paths.get(site.name, ())
    return not site.stack and all(_is_data(discovery, path) for path in paths)


def _is_data(discovery: Discovery, path: Path) -> bool:
    if not isinstance(path, HiddenPath | ConvolutionPath) or path.taps():
        return False  # S of its rows is of something else than the data
    use = path.producer
    needed = {use.op.ins[1 - use.operand]}
    for op in reversed(discovery.graph.ops):
        if any(value in needed for value in op.outs):
            needed.update(op.ins)
    return not any(value in needed for value in discovery.graph.params)
