"""Stacks of layers: a site under a scan over layers has an axis for them in front of all its arrays."""

from collections.abc import Callable
from typing import TypeVar

import jax

from tinyjax.core.site import Site

Function = TypeVar("Function", bound=Callable)


def map_layers(site: Site, function: Function) -> Function:
    """A function of one layer, mapped over the layers of a stack."""
    for _ in site.stack:
        function = jax.vmap(function)
    return function
