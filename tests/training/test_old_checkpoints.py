"""Checkpoints that tinyjax 0.1 wrote, before the code had rooms: read as they are, and gone on from."""

import dataclasses
import json
import zipfile

import pytest

import tinyjax
from tests.support.old_checkpoints import ARCHIVE, MODELS, OPTIMIZER, SAVED, SCHEDULE, STEPS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("old")
    zipfile.ZipFile(ARCHIVE).extractall(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_run_goes_on_as_it_would_have(name, folder):
    loss_fn, params, batch = MODELS[name]()
    saved = tinyjax.restore(folder / name, OPTIMIZER, like=params)
    assert saved.step == SAVED and len(saved.history) == 1
    assert all(saved.history[0].status[site] == tinyjax.Status.GROWN for site in saved.history[0].status)
    found = tinyjax.find_sites(loss_fn, saved.params, batch)
    for site in saved.sites:
        assert tinyjax.width(saved.params, site) == saved.history[0].width[site.name] == 3
        now = found[site.name]
        # What follows a capacity was not looked for.
        known = dataclasses.replace(now, powers=site.powers, unchecked=site.unchecked, fixed=site.fixed)
        assert site == known and "of a version that did not look" in site.unchecked
    batches = [batch] * (STEPS - SAVED)
    records = tinyjax.fit(
        loss_fn, saved.params, batches, OPTIMIZER, SCHEDULE, saved.key, num_neurons=1, **saved.progress()
    )
    assert [float(record.loss) for record in records] == pytest.approx(
        [json.loads((folder / "losses.json").read_text())[name]], rel=1e-10
    )
