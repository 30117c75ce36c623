"""Law 7 over the zoos: models that run at other capacities keep their loss there, and thinned ones when compacted."""

import numpy as np
import pytest

import tinyjax
from tests.support.numpy_jaxpr import evaluate
from tests.support.zoo import attention, images, layers, recurrent, residual

BUILDERS = {
    **{f"zoo {name}": build for name, build in layers.MODELS.items()},
    **{f"images {name}": build for name, build in images.IMAGES.items()},
    **{f"recurrent {name}": build for name, build in recurrent.RECURRENT.items()},
    **{f"attention {name}": build for name, build in attention.CASES.items()},
    **{f"stream {name}": lambda case=case: case for name, case in residual.CASES.items()},
}
CHECKS_SHAPES = (
    "ScopeParamShapeError", "retrieved shape", "reshape", "dot_general", "`x.shape",
)  # fmt: skip


SLOW = [name for name in BUILDERS if name.startswith("images") or "linen" in name or "equinox" in name]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in BUILDERS]
)
def test_other_capacities_keep_the_loss(name):
    model = BUILDERS[name]()
    model = model() if callable(model) else model
    sites = tinyjax.find_sites(model.loss_fn, model.params, model.batch, has_aux=getattr(model, "has_aux", False))
    free = [site for site in sites.growable if not site.fixed + site.unchecked]
    for site in sites.growable:
        assert not site.unchecked or any(word in site.unchecked for word in CHECKS_SHAPES), site.unchecked
        assert not site.fixed or "the model keeps a size of its own" in site.fixed
    if not free:
        return

    def loss(p, b):
        out = model.loss_fn(p, b)
        return out[0] if isinstance(out, tuple) else out

    params = evaluate(lambda p: tinyjax.thin(p, free, {s.name: s.capacity - 1 for s in free}), model.params)
    before = evaluate(loss, params, model.batch)
    wider = {site.name: site.capacity + 3 + 2 * i for i, site in enumerate(free)}
    wide = evaluate(lambda p: tinyjax.resize(p, sites, wider)[0], params)
    small = tinyjax.compact(params, free)[0]
    for other in (wide, small):
        np.testing.assert_allclose(evaluate(loss, other, model.batch), before, rtol=1e-12)
