"""Which leaves training never moves, and what may therefore not be written.

An optimizer freezes a leaf where its update is zero whatever the gradients are (`set_to_zero`, a mask, a label, a chain
that multiplies by zero). That is read off its program: no step is run, and a schedule that begins at zero, or a step
that waits for others, is no number of the program and freezes nothing. Nor does an optimizer that moves nothing at all.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from tinyjax.core.folding import UNKNOWN, Known, agree, fold
from tinyjax.core.kernels import have_bias, readers, rows
from tinyjax.core.params import Params, named_leaves, path_name
from tinyjax.core.site import Site, Sites
from tinyjax.surgery.trainable import Trainable, trained_names

Frozen = Mapping[str, str]
"""By path of a leaf, why training never moves it."""


def frozen_leaves(params: Params, optimizer: Any = None, trainable: Trainable = lambda params: params) -> Frozen:
    """The leaves that training never moves.

    Args:
        params: the full parameters; only shapes matter.
        optimizer: an Optax optimizer, or None.
        trainable: the part of the parameters that the optimizer sees.

    Returns:
        Path of each frozen leaf, also of those frozen in part, -> why.

    Example:
        >>> labels = {"in": "train", "out": "freeze"}
        >>> optimizer = optax.multi_transform({"train": optax.adam(1e-3), "freeze": optax.set_to_zero()}, labels)
        >>> tinyjax.surgery.frozen_leaves({"in": jnp.ones((4, 8)), "out": jnp.ones((8, 3))}, optimizer)
        {'out': 'the optimizer never moves it'}
    """
    trained = trained_names(trainable, params)
    outside = set(named_leaves(params)) - set(trained.values())
    frozen = dict.fromkeys(sorted(outside), "`trainable` leaves it out")
    if not hasattr(optimizer, "update"):
        return frozen
    leaves, treedef = jax.tree.flatten(jax.eval_shape(trainable, params))
    still = _still(optimizer, treedef, tuple((leaf.shape, leaf.dtype) for leaf in leaves))
    return frozen | {trained[name]: why for name, why in still}


@functools.lru_cache(maxsize=64)
def _still(optimizer: Any, treedef: Any, kinds: tuple[tuple[tuple[int, ...], Any], ...]) -> tuple[tuple[str, str], ...]:
    """Paths of the leaves whose update is zero, in all entries or in some, with the reason."""
    part = treedef.unflatten([jax.ShapeDtypeStruct(*kind) for kind in kinds])
    init, shapes = jax.make_jaxpr(optimizer.init, return_shape=True)(part)
    program = _update_program(optimizer, part, shapes)
    if program is None:
        return ()
    anything = [UNKNOWN] * treedef.num_leaves
    state = fold(init.jaxpr, init.consts, anything)
    # Hyperparameters are the user's to change between steps.
    given = ["hyperparams" in path_name(path).split("/") for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    state = [UNKNOWN if own else known for own, known in zip(given, state)]
    while True:  # keep of the initial state what no step changes: each turn forgets some of it, or is the last
        found = fold(program.jaxpr, program.consts, [*anything, *state, *anything])
        updates, after = found[: len(anything)], found[len(anything) :]
        kept = [agree(old, new) for old, new in zip(state, after)] if len(after) == len(state) else [UNKNOWN]
        if len(kept) == len(state) and all(map(_same, kept, state)):
            break
        state = kept if len(kept) == len(state) else [UNKNOWN] * len(state)
    if all(np.all(update == 0) for update in updates):  # growth without training, as with a rate of 0
        return ()
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(part)]
    return tuple((name, _why(update)) for name, update in zip(names, updates) if np.any(update == 0))


def _why(update: Known) -> str:
    return "the optimizer never moves " + ("it" if np.all(update == 0) else "some of its entries")


def _update_program(optimizer: Any, part: Params, state: Any) -> Any:
    """The jaxpr of a step; None for an optimizer that asks for more than a gradient, parameters and a loss."""

    def step(gradient: Any, state: Any, params: Any) -> Any:
        return optimizer.update(gradient, state, params)

    def step_with_loss(gradient: Any, state: Any, params: Any) -> Any:
        zero = np.zeros((), np.float32)
        return optimizer.update(gradient, state, params, value=zero, grad=gradient, value_fn=lambda params: zero)

    for function in (step, step_with_loss):
        try:
            return jax.make_jaxpr(function)(part, state, part)
        except TypeError:  # an argument is missing
            continue
    return None


def _same(one: Known, other: Known) -> bool:
    return one.shape == other.shape and np.array_equal(one, other, equal_nan=True)


def frozen_reason(site: Site, frozen: Frozen) -> str:
    """Why a site cannot grow while these leaves are frozen; "" where it can.

    A frozen fan-in is no obstacle: what is live in it stays, and new neurons learn by their fan-out.
    """
    for kernel in site.consumers:
        if kernel.leaf in frozen:
            return (
                f"its neurons are read by `{kernel.leaf}`, which is frozen ({frozen[kernel.leaf]}): a new fan-out "
                "there could never be trained, and an update would change it"
            )
    return ""


def frozen_rows(site: Site, frozen: Frozen) -> list[int]:
    """The rows of the consumers' matrix that hold a frozen bias."""
    found, end = [], 0
    for group in readers(site):
        end += rows(group[0]) + have_bias(group)
        if have_bias(group) and any(kernel.bias.leaf in frozen for kernel in group if kernel.bias is not None):
            found.append(end - 1)
    return found


def mark_frozen(sites: Iterable[Site], frozen: Frozen) -> Sites:
    """The sites, of which those that cannot grow while these leaves are frozen say so."""

    def marked(site: Site) -> Site:
        why = frozen_reason(site, frozen) if site.growable else ""
        return dataclasses.replace(site, growable=False, reason=why) if why else site

    return Sites(map(marked, sites))


def require_unfrozen(sites: Iterable[Site], frozen: Frozen) -> None:
    """Raises a ValueError for a site that cannot grow while these leaves are frozen."""
    for site in sites:
        if why := frozen_reason(site, frozen):
            raise ValueError(f"site `{site.name}` cannot grow: {why}. Train the leaf, or leave the site out")


def require_scalable(sites: Sites, capacities: Mapping[str, int], frozen: Callable[[], Frozen]) -> None:
    """Raises a ValueError where another capacity asks to multiply a frozen leaf."""
    changed = [sites[name] for name, capacity in capacities.items() if capacity != sites[name].capacity]
    if not any(site.powers for site in changed):
        return
    found = frozen()
    for site in changed:
        for leaf, power in site.powers:
            if leaf in found:
                raise ValueError(
                    f"another capacity of site `{site.name}` asks to multiply `{leaf}` by (new / old)^{power:g}, "
                    f"because the model divides by a power of the capacity, but that leaf is frozen ({found[leaf]}). "
                    "Allocate the final capacity from the start, or train the leaf"
                )
