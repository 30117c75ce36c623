"""The README and the pages that go on from it say what is so: their Python runs as one script, their commands exist."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import tinyjax
from experiments import grow
from experiments.bench import versus_gromo

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{name}.md" for name in ("loop", "checkpoints", "devices", "frameworks"))]
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES)


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def session():
    """What the code leaves behind, read as one script: the names after each block, and what it printed."""
    names = {}
    snapshots = []
    for i, block in enumerate(blocks("python")):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, f"Python block {i} of the pages", "exec"), names)
        snapshots.append(names | {"printed": printed.getvalue()})
    return snapshots


def after(session, text):
    """The names after the block that holds `text`."""
    (found,) = [names for names, block in zip(session, blocks("python")) if text in block]
    return found


def test_the_first_example_grows_as_it_is_shown(session):
    """When and how wide; the losses of a test are in another precision, so of other draws."""
    (shown,) = blocks("text")
    lines = [re.fullmatch(r"(\d+ \{.*\}) (\d\.\d+)", line).groups() for line in session[0]["printed"].splitlines()]
    assert [growth for growth, _ in lines] == re.findall(r"^(\d+ \{.*\})", shown, re.MULTILINE)
    assert float(lines[-1][1]) < float(lines[0][1]) / 4


@pytest.mark.parametrize(("text", "width"), [("class Net(nn.Module)", 32), ("import equinox", 20)])
def test_the_examples_grow_to_the_width_they_say(session, text, width):
    names = after(session, text)
    assert list(names["widths"].values()) == [width]
    assert list(names["record"].width.values()) == [width]
    assert names["record"].loss < 0.7 * np.log(10)  # of a network that knows nothing


def test_a_compact_network_runs_in_the_users_own_code(session):
    names = after(session, "class Net(nn.Module)")
    logits = names["Net"](names["widths"]["Dense_0"]).apply(names["params"], names["train"].image)
    accuracy = jnp.mean(logits.argmax(-1) == names["train"].label)
    names = after(session, "import equinox")
    assert accuracy > 0.8 and names["net"].layers[0].weight.shape == (20, 64)
    assert names["eqx_loss"](names["arrays"], names["train"]) < 1.0


def test_the_loop_and_the_recipes_grow(session):
    names = after(session, "def programs")
    assert int(tinyjax.width(names["params"], names["sites"][0])) == 14 and names["sites"][0].capacity == 16
    assert int(after(session, "TrainState.create")["info"].width["Dense_0"]) == 16
    assert int(after(session, "nnx.Optimizer")["info"].width["hidden"]) == 6


def test_it_is_short_enough():
    """The two examples on a user's own model are about 20 lines of code each."""
    for text in ("class Net(nn.Module)", "import equinox"):
        (block,) = [b for b in blocks("python") if text in b]
        assert len([line for line in block.splitlines() if line.strip()]) <= 28


def test_every_name_exists():
    for name in re.findall(r"tinyjax\.(\w+)", "".join(blocks("python"))):
        assert hasattr(tinyjax, name), name
    for field in re.findall(r"`(\w+)`", TEXT[TEXT.index("`info` says") : TEXT.index("A traced number")]):
        assert field == "info" or field in tinyjax.GrowthInfo._fields, field


def test_the_long_forms_are_what_make_does():
    """The commands beside `make run` and `make test` install the extras and start the modules of the Makefile."""
    commands, *_ = blocks("sh")
    makefile = (ROOT / "Makefile").read_text()
    options = re.search(r"PYTEST_ARGS \?= (.*)", makefile)[1]
    run, test = commands.splitlines()
    assert run.startswith("make run ") and '".[demo]"' in run and run.endswith("-m experiments.grow")
    assert test.startswith("make test ") and '".[test]"' in test and test.endswith(f'-m pytest {options} -m "not slow"')
    assert "run: $(VENV)/.demo" in makefile and "test: $(VENV)/.test" in makefile


def test_every_file_it_names_is_there():
    for name in ("CITATION.cff", "LICENSE", "Makefile", "experiments/grow.py"):
        assert (ROOT / name).exists()


def test_the_commands_of_the_results_are_understood():
    _, results, scripts = blocks("sh")
    for arguments in re.findall(r'ARGS="(.*)"', results):
        assert grow.parse(arguments.split()).seeds == 5
    for name, preset in re.findall(r"-m (experiments\.[\w.]+) --preset (\w+)", scripts):
        assert preset in importlib.import_module(name).EXPERIMENT.presets
    assert "python -m experiments.bench.versus_gromo --gromo" in scripts
    assert versus_gromo.parse(["--gromo", sys.executable]).dataset == "mnist5k"
