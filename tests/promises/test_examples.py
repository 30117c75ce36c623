"""The examples of the documentation run, and every public function has one.

They share the start that the docstring of `tinyjax` gives: what works here works when it is copied from the pages.
"""

import contextlib
import doctest
import inspect
import io

import pytest

import tinyjax
from docs import pages

FLAGS = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
PUBLIC = {
    f"{module.__name__}.{name}": value for module in pages.MODULES for name, value in pages.public(module).items()
}
# By value: a name that is public twice runs once.
WITH_EXAMPLE = list({id(value): name for name, value in PUBLIC.items() if ">>>" in (value.__doc__ or "")}.values())
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isfunction(inspect.unwrap(value))}


def run(name, docstring, namespace):
    """Runs the examples of a docstring; fails with what doctest has to say."""
    test = doctest.DocTestParser().get_doctest(docstring, namespace, name, None, 0)
    out = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False, optionflags=FLAGS)
    with contextlib.redirect_stdout(io.StringIO()):
        runner.run(test, out=out.write, clear_globs=False)
    assert not runner.failures, out.getvalue()
    return test


@pytest.fixture(scope="module")
def start():
    """What every example goes on from."""
    return run("tinyjax", tinyjax.__doc__, {"__name__": "examples"}).globs


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_the_example_runs(name, start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(name, inspect.getdoc(PUBLIC[name]), dict(start))


def test_every_public_function_has_an_example():
    # `tinyjax.methods` also holds the pieces that methods are made of.
    entries = {name: value for name, value in FUNCTIONS.items() if not name.startswith("tinyjax.methods.")}
    missing = [name for name, value in entries.items() if ">>>" not in (value.__doc__ or "")]
    assert not missing, f"these docstrings need an `Example:` with `>>>` lines: {missing}"


def test_every_public_name_has_a_docstring():
    assert not [name for name, value in PUBLIC.items() if not inspect.getdoc(value)]
