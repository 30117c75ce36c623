"""A room imports only from rooms on lower floors; inside a room there is no circle; methods see no network."""

import ast
from pathlib import Path

import pytest

from tinyjax.core.kinds import KINDS

PACKAGE = Path(__file__).parents[2] / "tinyjax"
FLOORS = [
    {"core", "data", "models", "plot"},
    {"discovery", "statistics", "surgery"},
    {"methods"},
    {"estimation"},
    {"growth", "analysis"},
    {"training"},
]
# Inside these rooms a folder imports only from those before it, and what lies beside the folders from all of them.
WITHIN = {"discovery": ["graph", "dimensions", "paths", "kinds"], "methods": ["solvers"], "growth": ["optimizer"]}
SEES_NO_NETWORK = {
    "methods": {"core.linalg", "core.neurons", "core.whole_numbers", "statistics"},
    "growth.line_searches": {"methods", "statistics"},
    "training.schedules": {"core.site", "core.whole_numbers"},
}
MAY_IMPORT = {
    "optax": {"growth.optimizer", "training"},
    "flax": {"models"},
    "tensorflow_datasets": {"data"},
    "matplotlib": {"plot"},
    "orbax": {"training.checkpoint"},
}
MOST_LINES, MOST_FILES = 300, 25


def name_of(path: Path) -> str:
    """`growth.optimizer.birth` for `tinyjax/growth/optimizer/birth.py`; a folder's name for its `__init__`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
face = FILES.pop("")
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
every_file = pytest.mark.parametrize("name", FILES)


def imports(name: str) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    found = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import; write `from tinyjax...`"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imported_files(name: str) -> set[str]:
    """The files of the library that a file imports."""
    found = set()
    for full in imports(name):
        parts = full.split(".")
        if parts[0] == "tinyjax":
            depth = max((d for d in range(2, len(parts) + 1) if ".".join(parts[1:d]) in FILES), default=0)
            assert depth, f"{name} imports `{full}`: nobody imports the front page, but the file that defines the name"
            found.add(".".join(parts[1:depth]))
    return found - {name}


def inside(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


@every_file
def test_imports_only_from_lower_floors(name):
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room, *rest = name.split(".")
    assert room in floor, f"tinyjax/{room} stands on no floor: add it to FLOORS in {Path(__file__).name}"
    folders = WITHIN.get(room, [])

    def height(parts: list[str]) -> int:
        return folders.index(parts[0]) if parts and parts[0] in folders else len(folders)

    for other in imported_files(name):
        its_room, *its_rest = other.split(".")
        if its_room != room:
            assert floor[its_room] < floor[room], (
                f"{name} imports {other}: `{its_room}` is no lower floor than `{room}`"
            )
        else:
            assert height(its_rest) <= height(rest), f"{name} imports {other}, which lies above it"


def test_no_circle_between_files():
    arrows = {name: imported_files(name) for name in FILES}
    done: set[str] = set()

    def visit(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"a circle of imports: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in arrows[name]:
                visit(other, (*way, name))
            done.add(name)

    for name in FILES:
        visit(name, ())


@every_file
def test_methods_searches_and_schedules_never_see_a_network(name):
    for place, allowed in SEES_NO_NETWORK.items():
        if inside(name, {place}):
            others = {other for other in imported_files(name) if not inside(other, allowed | {place})}
            assert not others, f"{name} imports {sorted(others)}"


@every_file
def test_frameworks_stay_at_the_edge(name):
    roots = {full.split(".")[0] for full in imports(name)}
    for framework, places in MAY_IMPORT.items():
        assert framework not in roots or inside(name, places), (
            f"{name} imports {framework}; only {', '.join(sorted(places))} may"
        )


@every_file
def test_a_file_is_short_and_bears_no_functions_name(name):
    """In `methods` alone a file is named after its function: that is what is looked for there."""
    lines = FILES[name].read_text().count("\n")
    assert lines <= MOST_LINES, f"{name} has {lines} lines"
    own = {node.name for node in TREES[name].body if isinstance(node, ast.FunctionDef)}
    assert name.split(".")[-1] not in own or inside(name, {"methods"}), f"{name} has the name of its function"


def test_every_room_has_a_door_sign_and_few_files():
    for folder in {path.parent for path in FILES.values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text())), (
            f"{folder.name}/__init__.py says nothing"
        )
        assert len(list(folder.glob("*.py"))) <= MOST_FILES, f"{folder.name} holds too many files"
        beside = folder.with_suffix(".py")
        assert not beside.exists(), f"{beside.name} lies beside a folder of its name, which hides it"


# What only some kinds have, and the files that may ask whether it is there: those of the kinds, writing, storing.
OF_SOME_KINDS = {"geometry", "weights", "cell", "pair", "head", "heads", "branches", "gate", "pattern", "stream"}
MAY_ASK = {"surgery.writing", "training.checkpoint.model"} | {
    f"{room}.{file}"
    for room in ("discovery.kinds", "estimation", "statistics", "methods.solvers")
    for file in [kind.replace(" ", "_").replace("-", "_") for kind in KINDS] + ["by_head"]
}


def test_every_kind_has_a_file_of_its_name():
    for kind in KINDS:
        file = kind.replace(" ", "_").replace("-", "_")
        assert {f"discovery.kinds.{file}", f"estimation.{file}"} <= FILES.keys(), f"no file is named after {kind}"


@every_file
def test_only_a_kind_asks_what_only_it_has(name):
    if name in MAY_ASK or not inside(name, {"discovery", "estimation", "analysis", "training", "surgery"}):
        return
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in OF_SOME_KINDS:
            asks = any(isinstance(other, ast.Constant) and other.value is None for other in node.comparators)
            assert not asks, f"{name}:{node.lineno} asks for `{node.left.attr}`; let the kind answer"
