"""No product of the library's own may run at an accelerator's default precision (TF32, bfloat16): read off the trace.

Products of the user's model are left as the user wrote them; they are known by the scope around the loss.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax

HIGHEST = (jax.lax.Precision.HIGHEST,) * 2
PRODUCTS = ("dot_general", "conv_general_dilated")


def convolve(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def network(product, kernel):
    """Two layers of a kind, an average where there are positions, logits."""

    @jax.named_scope("model")
    def loss_fn(params, batch):
        x, y = batch
        x = product(jnp.tanh(product(x, params["a"])), params["b"])
        return jnp.mean((jnp.tanh(x).mean(tuple(range(1, x.ndim - 1))) @ params["c"] - y) ** 2)

    rng = np.random.default_rng(0)
    shapes = {"a": (*kernel, 3, 6), "b": (*kernel, 6, 4), "c": (4, 2)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    positions = (5,) * len(kernel)
    arrays = rng.normal(size=(16, *positions, 3)), rng.normal(size=(16, 2))
    return loss_fn, params, tuple(jnp.asarray(x, jnp.float32) for x in arrays)


NETWORKS = {"dense": (jnp.matmul, ()), "conv": (convolve, (3, 3))}


def products(jaxpr) -> Iterator[tuple[str, object]]:
    """The scope and the precision of every product, at any depth."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in PRODUCTS:
            yield str(equation.source_info.name_stack), equation.params["precision"]
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(inner, "eqns"):
                yield from products(inner)


def own(function, *args):
    """The precisions of the products outside of the model, and how many are inside."""
    found = list(products(jax.make_jaxpr(function)(*args).jaxpr))
    assert all(precision is None for scope, precision in found if "model" in scope)
    return [precision for scope, precision in found if "model" not in scope], len(found)


@pytest.mark.parametrize("kind", NETWORKS)
def test_sums_are_kept_at_full_precision(kind):
    loss_fn, params, batch = network(*NETWORKS[kind])
    sites = tinyjax.find_sites(loss_fn, params, batch).growable
    precisions, _ = own(
        lambda params, batch: tinyjax.estimate(loss_fn, params, batch, sites, energy_matrix=True), params, batch
    )
    assert len(precisions) >= 5 * len(sites) and set(precisions) == {HIGHEST}


METHODS = ("tiny", "tiny0", "fisher_tiny", "gradmax", "north")


@pytest.mark.parametrize(
    ("kind", "method"), [*((kind, method) for kind in NETWORKS for method in METHODS), ("dense", "tiny_joint")]
)
def test_growths_solve_and_write_at_full_precision(kind, method):
    loss_fn, params, batch = network(*NETWORKS[kind])
    sites = tinyjax.find_sites(loss_fn, params, batch).growable
    update = None if method == "tiny_joint" else tinyjax.methods.best_update  # it brings its own
    grow = tinyjax.make_grow_step(
        loss_fn, sites["a"], num_neurons=1, method=getattr(tinyjax.methods, method), update=update
    )
    precisions, everything = own(grow, params, batch, jax.random.key(0))
    assert len(precisions) > 10 and everything > len(precisions) and set(precisions) == {HIGHEST}
