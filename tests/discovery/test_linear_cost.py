"""The cost of discovery is linear in the network: visits are counted, not seconds.

A visit is a line of the library that the interpreter reaches, so that calls, turns of loops and of comprehensions all
count. Python reports them itself: the library carries no counter.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
from flax import linen as nn

import tinyjax
from tests.support.zoo.deep import (
    MODELS,
    language_model,
    mlp,
    recurrent,
    residual,
    translator,
    vision_transformer,
    written_out,
)
from tinyjax.discovery import sites
from tinyjax.discovery.graph.tracing import Trace, trace
from tinyjax.discovery.sites import discover

PACKAGE = str(Path(tinyjax.__file__).parent)
DEPTHS = (4, 8, 16, 32)


def num_visits(traced: Trace) -> int:
    """Lines of the library that a discovery reaches."""
    count = 0

    def on_line(frame: Any, event: str, arg: Any) -> Any:
        nonlocal count
        count += event == "line"
        return on_line

    def on_call(frame: Any, event: str, arg: Any) -> Any:
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        discover(traced)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_adds_the_same_number_of_visits(name):
    """From 16 to 32 layers a layer must cost what it costs from 4 to 8."""
    visits = [num_visits(trace(*MODELS[name](depth))) for depth in DEPTHS]
    a_layer = [(b - a) / (deep - shallow) for a, b, shallow, deep in zip(visits, visits[1:], DEPTHS, DEPTHS[1:])]
    assert a_layer[0] > 100, "no visits were counted"
    assert max(a_layer) < 1.05 * a_layer[0], visits


def test_a_second_walk_over_the_whole_graph_for_every_layer_is_seen(monkeypatch):
    """The count can fail: one loop over all operations a dimension, and it is no longer linear."""

    def classify(model: Any, dimension: Any) -> Any:
        assert sum(len(op.outs) for op in model.graph.ops)
        return honest(model, dimension)

    honest = sites.classify
    # The loop is here, outside of the package: this folder's lines count as if they were the library's.
    monkeypatch.setattr(sites, "classify", classify)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", str(Path(__file__).parent))
    visits = [num_visits(trace(*mlp(depth))) for depth in DEPTHS]
    assert visits[3] - visits[2] > 3 * (visits[2] - visits[1]) > 0


@pytest.mark.parametrize(
    ("model", "growable"),
    [
        pytest.param(lambda: mlp(1000), 1000, id="mlp"),
        pytest.param(lambda: written_out(1000), 1, id="recurrence_written_out"),
        pytest.param(lambda: MODELS["products"](1000), 1000, id="products"),
        pytest.param(lambda: recurrent(2, steps=10_000), 2, id="scan_of_10000_steps"),
        pytest.param(lambda: residual(60, nn.RMSNorm), 61, id="residual"),
    ],
)
def test_what_is_deep_overflows_no_stack(model, growable):
    """With hardly more of Python's stack than JAX takes to trace: nothing may recurse along the network."""
    limit, deep = sys.getrecursionlimit(), model()
    traced = trace(*deep)
    sys.setrecursionlimit(_frames() + 120)
    try:
        found = discover(traced).sites
    finally:
        sys.setrecursionlimit(limit)
    assert len(found.growable) == growable


def _frames() -> int:
    frame, count = sys._getframe(), 0
    while frame is not None:
        frame, count = frame.f_back, count + 1
    return count


@pytest.mark.parametrize(
    ("model", "growable", "refused"),
    [
        # Of every attention its heads, queries and keys, and values; of every block its hidden layer; the streams not.
        pytest.param(language_model, 12 * 4, {"block0/self/out": "(a layer norm)"}, id="lm1b"),
        pytest.param(
            translator,
            12 * 4 + 12 * 7,
            {"encoder0/self/out": "(a layer norm)", "decoder0/self/out": "(a layer norm)"},
            id="wmt",
        ),
        pytest.param(vision_transformer, 12 * 4, {"patches": "is a convolution"}, id="vit"),
    ],
)
def test_public_blocks_at_12_layers(model, growable, refused):
    """Every dimension of every layer is found, and nothing else."""
    found = tinyjax.find_sites(*model(12))
    assert len(found.growable) == growable
    assert {site.name for site in found if not site.growable} == set(refused)
    for name, word in refused.items():
        assert word in found[name].reason
    kinds = [name.rpartition("/")[2] for name in found.growable.names]
    attentions = (growable - kinds.count("up")) // 3
    assert kinds.count("heads") == kinds.count("query") == kinds.count("value") == attentions
