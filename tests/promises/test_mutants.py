# ruff: noqa: E501
"""Tests that can fail: hand-made faults of the core, each with the test that kills it (a slow job).

A mutant is a text of the package and what takes its place. The file is the one that holds the text, which must be there
exactly once: whoever rewrites that line writes its mutant anew. The killer is named by its function, with the parameter
in brackets where one is enough; it passes on the package as it is and fails on the mutant.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[next(i for i, p in enumerate(Path(__file__).parents) if p.name == "tests") + 1]


class Mutant(NamedTuple):
    """A fault: what of the core it spoils, the text, what replaces it, and the test that kills it."""

    spoils: str
    old: str
    new: str
    killer: str


MUTANTS = [
    # Acceptance
    Mutant("the best update is accepted whatever the loss does", "kept = loss <= loss_before", "kept = loss == loss",
           "test_a_best_update_that_would_raise_the_loss_is_rejected"),
    Mutant("neurons are accepted whatever the loss does", "kept = loss_grown <= loss_updated", "kept = loss_grown == loss_grown",
           "test_a_growth_that_would_raise_the_loss_is_rejected"),
    Mutant("what is not finite is kept", "params = _select(finite, params, start)", "params = _select(finite | True, params, start)",
           "test_nan_in_the_batch_changes_nothing_and_says_so"),
    Mutant("fillers come besides the neurons", "left = jnp.minimum(wanted, free) - written", "left = jnp.minimum(wanted, free)",
           "test_a_growth_widens_lowers_the_loss_and_reports"),
    Mutant("a search may add what does not help", "amplitude = jnp.where(improved, end.amplitude, 0)", "amplitude = end.amplitude",
           "test_nothing_is_added_when_nothing_helps"),
    Mutant("no bound of the amplitude", "(state.gammas <= largest), losses, jnp.inf)", "(state.gammas <= jnp.inf), losses, jnp.inf)",
           "test_no_amplitude_beyond_the_maximum"),
    # Halves
    Mutant("the held-out gain of a growth is that of the samples seen", "(gain(2, 1) + gain(1, 2)) / 2", "(gain(1, 1) + gain(2, 2)) / 2",
           "test_the_held_out_gain_of_a_growth_is_that_of_the_other_half"),
    Mutant("the held-out gain of neurons is that of the samples seen", "effect_on(1 - i, *found, i).gain(gamma)",
           "effect_on(i, *found, i).gain(gamma)", "test_the_held_out_gain_of_neurons_is_that_of_the_other_half"),
    Mutant("the ridge of the update is scored on the half it was fitted on", "jnp.diagonal(a.gram), b.gram, b.cross)",
           "jnp.diagonal(a.gram), a.gram, a.cross)", "test_held_out_update_is_the_best_of_the_grid"),
    Mutant("an empty half is divided by zero", "count = jnp.where(count > 0, count, 1)", "count = count * 1",
           "test_an_empty_half_gives_zeros"),
    # Signs
    Mutant("the goal points uphill", "return -at.num_samples * jnp.concatenate(found, axis=-1)", "return at.num_samples * jnp.concatenate(found, axis=-1)",
           "test_a_best_update_that_would_raise_the_loss_is_rejected"),
    Mutant("what a falling activation writes keeps its sign", "return neurons._replace(omega=-neurons.omega)", "return neurons",
           "test_a_falling_activation_grows_as_the_rising_one[gelu]"),
    Mutant("the twin is taken for the neuron", "signs[best] * twins.amplitude[best]", "twins.amplitude[best]",
           "test_twin_search_finds_either_sign"),
    Mutant("factors of unknown sign are searched with one", "if statistics.is_flat and searches(recipe.amplitude):",
           "if statistics.is_flat and False:", "test_factors_that_are_parameters_are_searched_with_both_signs"),
    # Slots
    Mutant("every neuron goes one slot further", "dtype=jnp.int32) - 1\n    written =", "dtype=jnp.int32) - 2\n    written =",
           "test_neuron_k_goes_into_the_kth_free_slot"),
    Mutant("used slots are overwritten", "written = free & (rank < num_neurons)", "written = (rank < num_neurons)",
           "test_write_never_overwrites_and_stops_at_the_last_free_slot"),
    Mutant("the limit is one too many", "(rank < (num_neurons if limit is None else limit))", "(rank <= (num_neurons if limit is None else limit))",
           "test_limit_zero_neurons_and_zero_amplitude_write_nothing"),
    Mutant("thin keeps one slot less", "np.arange(site.capacity) >= kept)", "np.arange(site.capacity) >= kept - 1)",
           "test_width_counts_used_slots_and_thin_empties_the_rest"),
    Mutant("the fan-in takes the whole amplitude", "root = jnp.sqrt(amplitude)\n    return root, root", "root = jnp.sqrt(amplitude)\n    return amplitude, root",
           "test_write_adds_the_neurons_and_the_update_to_the_function"),
    Mutant("outputs and offsets of a fan-out are exchanged", "x = omega.reshape(*omega.shape[:-1], num_outputs, *(layout.factors[f] for f in offsets))",
           "x = omega.reshape(*omega.shape[:-1], *(layout.factors[f] for f in offsets), num_outputs).swapaxes(-1, -2) "
           "if len(offsets) == 1 else omega.reshape(*omega.shape[:-1], num_outputs, *(layout.factors[f] for f in offsets))",
           "test_fan_out_of_a_flattened_axis_is_ordered_output_then_position"),
    # Merging
    Mutant("records are not added", "map_sums(lambda y, x: x + y", "map_sums(lambda y, x: jnp.maximum(x, y)",
           "test_merge_is_the_record_of_all_samples"),
    Mutant("a merged record keeps the older weights", "map_sums(lambda y, x: x + y, b, a)", "map_sums(lambda y, x: x + y, a, b)",
           "test_merge_takes_weights_and_width_from_the_second"),
    # Optimizer states
    Mutant("newborns are as old as the network", "jnp.where(_spread(vector, axis, old.ndim), state.count, old)",
           "jnp.where(_spread(vector, axis, old.ndim), old, old)", "test_an_entry_is_as_old_as_its_younger_side"),
    Mutant("an entry is as old as its older side", "birth = jnp.maximum(birth, axis[name])", "birth = jnp.minimum(birth, axis[name])",
           "test_newborn_slots_step_like_a_fresh_optimizer_and_old_ones_as_before"),
    Mutant("ages are one step too old", "jnp.where(birth > 0, state.count + 1 - birth, new.count)",
           "jnp.where(birth > 0, state.count + 2 - birth, new.count)", "test_newborn_slots_step_like_a_fresh_optimizer_and_old_ones_as_before"),
    Mutant("moments of newborns stay", "return jnp.where(mask, fresh, old)", "return jnp.where(mask, old, old)", "test_the_other_rules"),
    Mutant("a resize forgets the moments", "return _over(fresh, x, axes) if shape == fresh.shape else fresh", "return fresh",
           "test_training_goes_on_as_if_nothing_had_been_resized"),
    Mutant("a cut takes used slots", "return np.r_[used, np.flatnonzero(free)][:capacity]", "return np.arange(capacity)",
           "test_cutting_moves_used_slots_to_the_front_only_if_needed"),
    # Keys
    Mutant("all sites draw with one key", "site_key = None if key is None else jax.random.fold_in(key, index)", "site_key = key",
           "test_every_site_and_every_growth_draws_with_a_key_of_its_own"),
    Mutant("all growths draw with one key", "batch, jax.random.fold_in(key, done), fits)", "batch, key, fits)",
           "test_every_site_and_every_growth_draws_with_a_key_of_its_own"),
    # Schedules and capacities
    Mutant("the calendar forgets its start", "(step - start) % period == 0", "step % period == 0",
           "test_every_grows_all_sites_up_to_their_final_widths"),
    Mutant("growth goes beyond the final width", "added[name] = missing if step is None else min(step, missing)",
           "added[name] = missing if step is None else step", "test_every_grows_all_sites_up_to_their_final_widths"),
    Mutant("sites do not take turns", "turn = (step - start) // period % len(names)", "turn = 0",
           "test_round_robin_takes_turns_and_skips_full_sites"),
    Mutant("sites that were never measured come last", 'known.get(name, float("inf")) / (price', 'known.get(name, 0.0) / (price',
           "test_most_gain_measures_each_site_once_then_takes_the_best_rate"),
    Mutant("early growth does not arrive", "-(-missing // left[step])", "missing // left[step]", "test_early_spreads_growth_over_the_first_quarter_and_arrives"),
    Mutant("the budget is overdrawn", "if cost(after) <= limit:", "if cost(after) <= 2 * limit:", "test_budget_grants_neurons_while_they_fit"),
    Mutant("a policy cuts what is needed", "return {name: max(n, min(grid[name], final[name])) for name, n in needed.items()}",
           "return {name: min(grid[name], final[name]) for name, n in needed.items()}", "test_policies_hold_the_need_and_stop_at_the_final_widths"),
]  # fmt: skip


def only_file(folder: Path, text: str) -> Path:
    """The file that holds a text, which must be there exactly once."""
    found = {path: count for path in folder.rglob("*.py") if (count := path.read_text().count(text))}
    assert sum(found.values()) == 1, f"{text!r} is there {sum(found.values())} times: write its mutant anew"
    return next(iter(found))


def arguments_of(killers: list[str]) -> list[str]:
    """Pytest's names of tests."""
    names = []
    for killer in killers:
        function, bracket, parameter = killer.partition("[")
        path = only_file(ROOT / "tests", f"\ndef {function}(").relative_to(ROOT)
        names.append(f"{path}::{function}{bracket}{parameter}")
    return names


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The package and its tests, to be spoiled."""
    folder = tmp_path_factory.mktemp("mutants")
    for name in ("tinyjax", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def run(folder: Path, killers: list[str]) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-x", "-p", "no:cacheprovider", *arguments_of(killers)]
    environment = os.environ | {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_table_is_long_enough_and_names_what_is_there():
    assert len(MUTANTS) >= 25 and len({mutant.old for mutant in MUTANTS}) == len(MUTANTS)
    for mutant in MUTANTS:
        only_file(ROOT / "tinyjax", mutant.old)
    arguments_of([mutant.killer for mutant in MUTANTS])


@pytest.mark.slow
def test_the_killers_pass_on_the_package_as_it_is(copy):
    found = run(copy, list(dict.fromkeys(mutant.killer for mutant in MUTANTS)))
    assert found.returncode == 0, found.stdout[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.spoils.replace(" ", "_") for mutant in MUTANTS])
def test_the_mutant_is_killed(copy, mutant):
    path = only_file(copy / "tinyjax", mutant.old)
    before = path.read_text()
    path.write_text(before.replace(mutant.old, mutant.new))
    try:
        found = run(copy, [mutant.killer])
    finally:
        path.write_text(before)
    killed = re.search(r"^\d+ failed", found.stdout.splitlines()[-1] if found.stdout else "")
    assert found.returncode == 1 and killed, (
        f"{mutant.killer} survives it:\n{found.stdout[-2000:]}{found.stderr[-500:]}"
    )
