"""A module imports only from strictly lower ranks, and only the outer modules know Optax and Flax."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyjax"
RANKS = {
    "layout": 0,
    "linalg": 0,
    "atoms": 0,
    "site": 1,
    "trace": 1,
    "axes": 2,
    "patches": 2,
    "slots": 2,
    "capture": 3,
    "uses": 3,
    "flow": 4,
    "sites": 5,
    "statistics": 4,
    "estimate": 5,
    "methods": 5,
    "surgery": 5,
    "scaling": 6,
    "schedule": 6,
    "optimizer": 6,
    "data": 6,
    "models": 6,
    "plot": 6,
    "growth": 7,
    "diagnosis": 8,
    "checkpoint": 8,
    "training": 9,
}
MAY_IMPORT = {
    "optax": {"optimizer", "training"},
    "flax": {"models", "training"},
    "tensorflow_datasets": {"data"},
    "matplotlib": {"plot"},
}
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def module_of(path: Path) -> str:
    """The module (or package) of tinyjax that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import; write `from tinyjax...`"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_lower_ranks(path):
    module = module_of(path)
    assert module in RANKS, f"tinyjax/{module} has no rank: add it to RANKS in {Path(__file__).name}"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "tinyjax":
            continue
        assert len(parts) > 1, f"tinyjax/{module} imports the whole package; import the module it needs"
        if parts[1] == module:
            continue
        assert parts[1] in RANKS, f"tinyjax/{module} imports `{name}`, which has no rank"
        assert RANKS[parts[1]] < RANKS[module], (
            f"tinyjax/{module} (rank {RANKS[module]}) imports tinyjax/{parts[1]} (rank {RANKS[parts[1]]})"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_stay_at_the_edge(path):
    roots = {name.split(".")[0] for name in imports(path)}
    for framework, modules in MAY_IMPORT.items():
        assert framework not in roots or module_of(path) in modules, (
            f"tinyjax/{module_of(path)} imports {framework}; only {', '.join(sorted(modules))} may"
        )
