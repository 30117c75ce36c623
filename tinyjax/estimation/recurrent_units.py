"""The sums of recurrent units: a row for every state that is read, of what makes it and of all that read it."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from tinyjax.core.kernels import cols, rows
from tinyjax.core.layout import Layout
from tinyjax.discovery.kinds.recurrent_states import NONE
from tinyjax.discovery.kinds.recurrent_units import RecurrentPath
from tinyjax.estimation.hidden_layer import sums_of_rows
from tinyjax.estimation.rows import Rows, captured_matrix
from tinyjax.estimation.summation import SitePass, Summation, added
from tinyjax.statistics.dense import halves
from tinyjax.statistics.sums import Sums


def _sums(at: SitePass, path: RecurrentPath) -> Sums:
    found = _rows(at, path)
    sums = sums_of_rows(at, found)
    each = halves(found.v, at.num_samples) ** 2 / jnp.array(_shares(at), found.v.dtype)
    return dataclasses.replace(sums, energy=jnp.sum(each, axis=(-2, -1)))


def _rows(at: SitePass, path: RecurrentPath) -> Rows:
    """The rows of the states that are read, in (samples, other axes, steps)."""
    site, inputs = at.site, at.captured.inputs
    terms = {leaf: _by_step(use.inputs, inputs[use.op.path], path.length) for leaf, use in path.terms.items()}
    recorded = [_by_step(use.inputs, inputs[use.op.path], len(r)) for use, r in zip(path.consumers, path.reads)]
    asked = [
        -at.num_samples * _by_step(use.outputs, at.captured.gradients[use.op.path], len(steps))
        for use, steps in zip(path.consumers, path.reads)
    ]
    num_rows, dtype = len(recorded[0]), jnp.result_type(*terms.values(), *recorded, *asked)
    blocks = [
        terms[kernel.leaf] if kernel.leaf in terms else jnp.zeros((num_rows, path.length, rows(kernel)), dtype)
        for kernel in site.producers
    ]
    h = jnp.zeros((num_rows, path.length, site.capacity), dtype)
    goals = {kernel.leaf: jnp.zeros((num_rows, path.length, cols(kernel)), dtype) for kernel in site.consumers}
    for use, steps, seen, goal in zip(path.consumers, path.reads, recorded, asked):
        at_steps = np.flatnonzero(np.array(steps) != NONE)
        states = np.array(steps)[at_steps]
        h = h.at[:, states].set(seen[:, at_steps].astype(dtype))
        goals[use.leaf] = goals[use.leaf].at[:, states].add(goal[:, at_steps].astype(dtype))
    read = sorted({step for steps in path.reads for step in steps} - {NONE})
    parts = jnp.concatenate(blocks, -1), h, jnp.concatenate(list(goals.values()), -1)
    return Rows(*(part[:, np.array(read)].reshape(num_rows * len(read), -1) for part in parts))


def _by_step(layout: Layout, array: Array, num_steps: int) -> Array:
    """A captured array as `(rows, steps, cols)`."""
    matrix = captured_matrix(layout, array)
    return matrix.reshape(-1, num_steps, matrix.shape[-1])


def _shares(at: SitePass) -> tuple[float, ...]:
    """For each column of the consumers, the share of the states that it reads."""
    paths = [path for path in at.paths if isinstance(path, RecurrentPath)]
    read = [[{*steps} - {NONE} for steps in path.reads] for path in paths]
    total = sum(len(set[int]().union(*steps)) for steps in read)
    mine = dict.fromkeys((kernel.leaf for kernel in at.site.consumers), 0)
    for path, steps in zip(paths, read):
        for use, found in zip(path.consumers, steps):
            mine[use.leaf] += len(found)
    return tuple(mine[kernel.leaf] / total for kernel in at.site.consumers for _ in range(cols(kernel)))


def _join(at: SitePass, parts: Sequence[Sums]) -> tuple[Sums, dict[str, Any]]:
    return added(at, parts)[0], {"shares": _shares(at)}


SUMMATION = Summation(_sums, join=_join)
