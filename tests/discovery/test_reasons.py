"""A reason is shown only where the pattern it names was found, and no reason of discovery goes untested."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.support import refusals, told
from tests.support.zoo import recurrent
from tinyjax.discovery.sites import find_sites

DISCOVERY = Path(__file__).parents[2] / "tinyjax" / "discovery"
SAYING = {"CannotGrow", "Verdict", "mark", "_mark_all"}  # whose argument is a reason
ELSEWHERE = 82  # different reasons that tests of their own rooms tell
PATTERN = re.compile(r"\(((?:an?|tied) [a-z -]+)[,)]")


@functools.cache
def reasons(name: str) -> tuple[str, ...]:
    model = told.TOLD[name]()
    return tuple(site.reason for site in find_sites(model.loss_fn, model.params, model.batch))


@functools.cache
def all_reasons() -> dict[str, tuple[str, ...]]:
    """The reasons of every model that is refused something, by its name."""
    found = {name: reasons(name) for name in told.TOLD}
    for name, case in refusals.REFUSALS.items():
        found[f"refusals: {name}"] = tuple(s.reason for s in find_sites(case.loss_fn, case.params, case.batch))
    for name, build in recurrent.RECURRENT.items():
        case = build() if callable(build) else build
        found[f"recurrent: {name}"] = tuple(s.reason for s in find_sites(case.loss_fn, case.params, case.batch))
    return found


@pytest.mark.parametrize("name", told.TOLD)
def test_a_reason_says_what_is_there_and_nothing_else(name):
    said = {word for word in told.WORDS if any(word in reason for reason in reasons(name))}
    assert said == told.TOLD[name]().words, reasons(name)


@pytest.mark.parametrize("name", told.TOLD)
def test_inputs_are_never_listed(name):
    model = told.TOLD[name]()
    sites = find_sites(model.loss_fn, model.params, model.batch)
    assert not any("input of the model" in site.reason for site in sites)
    assert 5 not in {site.capacity for site in sites if site.producers or site.consumers}


def strings(tree: ast.AST) -> list[str]:
    """The strings of a module, docstrings left out."""
    texts = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    documented = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [node.value for node in texts if id(node) not in documented]


def discovery() -> dict[str, ast.Module]:
    """The modules that give reasons, parsed."""
    trees = {path.stem: ast.parse(path.read_text()) for path in DISCOVERY.rglob("*.py")}
    return {name: tree for name, tree in trees.items() if said_by(tree)}


def said_by(tree: ast.Module) -> list[re.Pattern]:
    """The reasons that a module may give, whatever names they are filled with."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in SAYING:
            found += [re.compile(text) for arg in node.args if (text := as_pattern(arg))]
    return found


def as_pattern(node: ast.expr) -> str:
    """A string as a regular expression, anything in the place of what it is filled with; "" for other expressions."""
    if isinstance(node, ast.Constant):
        return re.escape(node.value) if isinstance(node.value, str) else ""
    if not isinstance(node, ast.JoinedStr):
        return ""
    parts = [re.escape(part.value) if isinstance(part, ast.Constant) else ".+" for part in node.values]
    return "".join(map(str, parts)) if any(part != ".+" for part in parts) else ""


def test_no_reason_guesses():
    guesses = [text for tree in discovery().values() for text in strings(tree) if "?)" in text]
    assert not guesses


def test_every_pattern_that_is_named_is_found_somewhere_and_not_elsewhere():
    named = {name for tree in discovery().values() for text in strings(tree) for name in PATTERN.findall(text)}
    named |= {"a softmax", "a layer norm", "a norm", "a mean"}
    everything = all_reasons()
    for name in named:
        said = [model for model, found in everything.items() if any(f"({name}" in reason for reason in found)]
        assert said, f"no model is told `{name}`"
        assert len(said) < len(everything) / 4, f"`{name}` is told of {said}"


def test_every_new_reason_comes_with_a_model():
    """How many reasons no model here is told; tests of their own rooms tell most of them."""
    everything = [reason for found in all_reasons().values() for reason in found if reason]
    silent = {
        pattern.pattern
        for tree in discovery().values()
        for pattern in said_by(tree)
        if not any(pattern.search(reason) for reason in everything)
    }
    print("\n".join(sorted(silent)))
    assert len(silent) <= ELSEWHERE
