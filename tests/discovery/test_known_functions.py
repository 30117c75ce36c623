"""The functions of `tinyjax.models` that discovery knows by name are there, under these names, and no others are."""

import importlib
import pkgutil

import tinyjax.models
from tinyjax.discovery.graph.known_functions import KNOWN_FUNCTIONS


def test_the_known_functions_are_the_jitted_ones_of_the_models():
    modules = [
        importlib.import_module(m.name) for m in pkgutil.walk_packages(tinyjax.models.__path__, "tinyjax.models.")
    ]
    jitted = {
        thing.__name__
        for module in modules
        for thing in vars(module).values()
        if hasattr(thing, "lower") and hasattr(thing, "trace") and thing.__module__ == module.__name__
    }
    # a jaxpr names a call after the function
    assert {name for name in jitted if name.startswith("tinyjax_")} == KNOWN_FUNCTIONS
