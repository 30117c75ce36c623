"""Whose checkpoint it is: sites as plain data, and the names, dtypes and shapes that tell models apart."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinyjax.core.layout import Layout
from tinyjax.core.params import Params, named_leaves
from tinyjax.core.site import Kernel, Member, Norm, Site, Sites, Stream
from tinyjax.training.checkpoint.packing import Leaf

Json = Any
_OLD = "it comes from a checkpoint of a version that did not look for numbers that follow a capacity"


def site_to_json(site: Site) -> Json:
    """A site as dicts, lists, strings and numbers."""
    return dataclasses.asdict(site)


def site_from_json(node: Json) -> Site:
    """Inverse of `site_to_json`."""
    return Site(
        **node
        | dict(
            members=tuple(Member(_layout(m["layout"]), m["role"]) for m in node["members"]),
            producers=tuple(map(_kernel, node["producers"])),
            consumers=tuple(map(_kernel, node["consumers"])),
            stack=tuple(node["stack"]),
            norm=None if node["norm"] is None else Norm(**node["norm"]),
            gate=None if node["gate"] is None else _kernel(node["gate"]),
            pattern=tuple(map(_kernel, node["pattern"])),
            powers=tuple((leaf, power) for leaf, power in node["powers"]),
            stream=None if node["stream"] is None else _stream(node["stream"]),
            unchecked=node.get("unchecked", _OLD),
        )
    )


def _kernel(node: Json) -> Kernel:
    bias = None if node["bias"] is None else _layout(node["bias"])
    return Kernel(**node | dict(layout=_layout(node["layout"]), bias=bias))


def _stream(node: Json) -> Stream:
    return Stream(tuple(node["readers"]), node["normed"])


def _layout(node: Json) -> Layout:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in node.items()}
    return Layout(**fields)


def check_same_model(stored: Sequence[Leaf], sites: Sites, like: Params) -> None:
    """Raises a ValueError unless `like` has the stored leaves, up to the capacities of the sites."""
    mine = {name: (_dtype(leaf), jnp.shape(leaf)) for name, leaf in named_leaves(like).items()}
    theirs = {leaf.name: (_key_dtype(leaf), leaf.shape) for leaf in stored}
    _check_names("the model", theirs, mine)
    free = _growing_axes(sites)
    for leaf in stored:
        (dtype, shape), (my_dtype, my_shape) = theirs[leaf.name], mine[leaf.name]
        shape = shape[: len(my_shape)] if leaf.key is not None else shape
        units = free.get(leaf.name, {})
        fits = len(shape) == len(my_shape) and all(
            a == b or (axis in units and b % units[axis] == 0) for axis, (a, b) in enumerate(zip(shape, my_shape))
        )
        if not fits or dtype != my_dtype:
            raise ValueError(
                f"the checkpoint is of another model: its `{leaf.name}` is {dtype}{list(shape)}, here it is "
                f"{my_dtype}{list(my_shape)}, and that is no other width of a site"
            )


def check_same_optimizer(stored: Sequence[Leaf], template: Any) -> None:
    """Raises a ValueError unless an optimizer's state has the stored leaves."""
    mine = {name: (str(leaf.dtype), leaf.shape) for name, leaf in named_leaves(template).items()}
    theirs = {leaf.name: (_key_dtype(leaf), leaf.shape) for leaf in stored}
    _check_names("the optimizer", theirs, mine)
    for name, (dtype, shape) in theirs.items():
        if (dtype, shape) != mine[name]:
            raise ValueError(
                f"the checkpoint is of another optimizer: its `{name}` is {dtype}{list(shape)}, here it is "
                f"{mine[name][0]}{list(mine[name][1])}"
            )


def _check_names(what: str, theirs: dict[str, Any], mine: dict[str, Any]) -> None:
    for name in sorted(theirs.keys() - mine.keys()):
        raise ValueError(f"the checkpoint is of another run: {what} here has no `{name}`")
    for name in sorted(mine.keys() - theirs.keys()):
        raise ValueError(f"the checkpoint is of another run: it has no `{name}`, which {what} has here")


def _growing_axes(sites: Sites) -> dict[str, dict[int, int]]:
    """For every leaf, the axes along which sites lie, and what their sizes are multiples of at any capacity."""
    found: dict[str, dict[int, int]] = {}
    for site in sites:
        for layout in (member.layout for member in site.members):
            assert layout.slot is not None
            axis = layout.axes[layout.slot]
            unit = int(np.prod([f for f, a in zip(layout.factors, layout.axes) if a == axis])) // site.capacity
            axes = found.setdefault(layout.leaf, {})
            axes[axis] = 1 if axis in axes else unit
    return found


def _dtype(leaf: Any) -> str:
    return str(leaf.dtype) if hasattr(leaf, "dtype") else str(jax.dtypes.canonicalize_dtype(type(leaf)))


def _key_dtype(leaf: Leaf) -> str:
    return leaf.dtype if leaf.key is None else leaf.key
