"""The sums of convolutions: images through their windows."""

import math
from functools import partial
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from tinyjax.core.kernels import consumers_have_bias, matrices, producers_have_bias
from tinyjax.core.linalg import solve
from tinyjax.core.params import Params
from tinyjax.core.site import Site
from tinyjax.core.slots import width
from tinyjax.core.windows import num_offsets
from tinyjax.discovery.kinds.convolution import ConvolutionPath
from tinyjax.estimation.rows import path_rows
from tinyjax.estimation.summation import SitePass, Summation, sample_counts
from tinyjax.methods.solvers.best_update import Ridge, resolve
from tinyjax.statistics.averages import moments
from tinyjax.statistics.convolution.image_sums import LINK_LIMIT, Projection, conv_sums
from tinyjax.statistics.record import Statistics
from tinyjax.statistics.sums import Sums


def _sums(at: SitePass, path: ConvolutionPath) -> Sums:
    geometry, (x, h, v) = path.geometry, path_rows(at, path)
    projected: dict[str, Any] = {}
    if at.project is not None and len(at.paths) == 1:
        once = partial(projection, at.project, at.site, at.params, at.num_samples)
        projected = {"project": once, "asked": False, "link_limit": 0}
    if at.update is not None:
        projected["project"] = lambda gram, cross: at.update
    return conv_sums(
        x.reshape(at.num_samples, *geometry.space, -1),
        h.reshape(at.num_samples, *geometry.hidden, -1),
        v.reshape(at.num_samples, *geometry.out, -1),
        geometry.producer,
        geometry.consumer,
        between=geometry.between,
        bias_prev=producers_have_bias(at.site),
        bias=consumers_have_bias(at.site),
        extras=at.extras,
        **projected,
    )


def _is_wide(path: ConvolutionPath) -> bool:
    producer, consumer = path.producer.kernel, path.consumers[0].kernel
    inputs, hidden = (math.prod(k.factors[f] for f in k.rows) for k in (producer, consumer))
    return num_offsets(path.geometry.consumer) * inputs * hidden > LINK_LIMIT


def projection(ridge: Ridge, site: Site, params: Params, num_samples: int, gram: Array, cross: Array) -> Projection:
    """The best update at a ridge, which may be chosen from G (2, H, H) and M (2, H, M); S and N are empty then."""
    weight_prev, weight = (matrix.astype(gram.dtype) for matrix in matrices(params, site))
    record = Statistics(
        count=sample_counts(num_samples, gram.dtype),
        gram_prev=jnp.zeros((2, 0, 0), gram.dtype),
        cross_prev=jnp.zeros((2, 0, 0), gram.dtype),
        gram=gram,
        cross=cross,
        link=None,
        energy=jnp.zeros((2,), gram.dtype),
        energy_matrix=None,
        weight_prev=weight_prev,
        weight=weight,
        width=width(params, site),
        bias_prev=producers_have_bias(site),
        bias=consumers_have_bias(site),
    )
    mean, value = moments(record), jnp.asarray(resolve(ridge, record), gram.dtype)
    return Projection(solve(mean.gram, mean.cross, value), value)


SUMMATION = Summation(_sums, is_wide=_is_wide)
