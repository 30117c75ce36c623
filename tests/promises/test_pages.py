"""What pages, docstrings and comments name is there: commands, links, files, functions, fields."""

import ast
import functools
import importlib
import importlib.util
import inspect
import re
import runpy
import sys
from pathlib import Path

import pytest

import tinyjax

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tinyjax"
PAGES = sorted(path for path in ROOT.rglob("*.md") if not any(part.startswith(".") for part in path.parts[1:]))
SOURCES = [*PAGES, ROOT / "Makefile", ROOT / ".ci" / "run"]
SOURCES += [
    path for top in ("tinyjax", "experiments", "tests", "notebooks", "docs") for path in (ROOT / top).rglob("*")
]
SOURCES = sorted({path for path in SOURCES if path.suffix in {".py", ".md", ".ipynb", ""} and path.is_file()})
HISTORY = {"docs/moved.md"}  # it names what was
MOVED = (ROOT / "docs" / "moved.md").read_text()
NAMED = ["docs/architecture.md", "docs/notation.md"]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


@functools.cache
def defined(path: Path) -> frozenset[str]:
    """`function`, `Class`, `Class.method`, `Class.field`, `CONSTANT` of a file, functions in functions too."""
    found = set()

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                found.add(prefix + child.name)
                visit(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)
            elif isinstance(child, (ast.Assign, ast.AnnAssign)):
                targets = child.targets if isinstance(child, ast.Assign) else [child.target]
                found.update(prefix + target.id for target in targets if isinstance(target, ast.Name))

    visit(ast.parse(path.read_text()), "")
    return frozenset(found)


def test_every_command_exists():
    """`python -m NAME` anywhere: the module is there, and runs as a script."""
    named = {
        name for path in SOURCES for name in re.findall(r"-m ((?:experiments|tests|tinyjax)[\w.]*)", path.read_text())
    }
    assert {"experiments.grow", "experiments.report", "experiments.bench", "experiments.bench.versus_gromo"} <= named
    for name in named:
        parts = name.rstrip(".").removesuffix(".NAME").split(".")
        path = ROOT.joinpath(*parts)
        if name.rstrip(".").endswith(".NAME"):
            assert path.is_dir(), name
            continue
        script = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
        assert script.exists(), f"`python -m {name}`: there is no {script.relative_to(ROOT)}"
        assert 'if __name__ == "__main__":' in script.read_text(), (
            f"{script.relative_to(ROOT)} does nothing as a script"
        )


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")
@pytest.mark.parametrize("name", ["grow", "report", "bench", "bench.versus_gromo"])
def test_a_command_says_how_it_is_used(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=False)
    assert capsys.readouterr().out.startswith("usage:")


@every_page
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("door", sorted(PACKAGE.glob("*/**/__init__.py")), ids=lambda path: path.parent.name)
def test_a_door_says_what_enters_what_leaves_and_where_to_read_first(door):
    sign = " ".join((ast.get_docstring(ast.parse(door.read_text())) or "").split())
    assert all(word in sign for word in ("Enters: ", "Leaves: ", "Read first: "))
    for file in re.findall(r"`([\w/]+\.py)`", sign):
        assert (door.parent / file).exists(), file


@pytest.mark.parametrize("page", NAMED)
def test_every_file_and_every_name_in_it_exists(page):
    """`room/file.py:name` is meant inside `tinyjax`, unless it begins with another folder of the repository."""
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w/.]+\.py)(?::([\w.]+))?`", text)
    assert len(named) > 20
    for file, name in named:
        path = ROOT / file if file.split("/")[0] in {"tests", "docs", "experiments"} else PACKAGE / file
        assert path.exists(), f"{page} names {file}"
        assert not name or name in defined(path), f"{page} names {name} of {file}"
    for folder in re.findall(r"`([\w/]+/)`", text):
        assert (PACKAGE / folder).is_dir() or (ROOT / folder).is_dir(), f"{page} names the folder {folder}"


def test_every_dotted_name_exists():
    """What is written as a name inside tinyjax, room by room, can be reached under it."""
    for path in SOURCES:
        if str(path.relative_to(ROOT)) in HISTORY:
            continue
        for name in set(re.findall(r"`(tinyjax(?:\.\w+)+)", path.read_text())):
            assert reachable(name), f"{path.relative_to(ROOT)} names {name}"


def test_every_public_name_that_moved_is_where_the_page_says():
    """And is not in its old place: all 104 public names of the root in 0.1 are on the page."""
    names = set(re.findall(r"`(\w+)`", re.search(r"Not moved: (.*?), and the modules", MOVED, re.DOTALL)[1]))
    assert names == set(tinyjax.__all__) - {"__version__"}
    for old, room in re.findall(r"^\| (.*) \| `(tinyjax[\w.]+)` and the same name \|$", MOVED, re.MULTILINE):
        for name in re.findall(r"`(\w+)`", old):
            assert reachable(f"{room}.{name}") and not hasattr(tinyjax, name), name
            names.add(name)
    for old, new in re.findall(r"^\| `(tinyjax\.[\w.]+)` \| `(tinyjax\.[\w.]+)` \|$", MOVED, re.MULTILINE):
        assert reachable(new) and not reachable(old), old
        names |= {old.removeprefix("tinyjax.")} if old.count(".") == 1 else set()
    assert len(names) == 104


def reachable(name: str) -> bool:
    """Whether attributes and modules lead to a dotted name."""
    value = tinyjax
    for depth, part in enumerate(name.split(".")[1:], 2):
        module = ".".join(name.split(".")[:depth])
        if not hasattr(value, part) and inspect.ismodule(value) and importlib.util.find_spec(module):
            importlib.import_module(module)
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True
