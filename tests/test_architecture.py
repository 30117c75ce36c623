"""A module imports only from strictly lower ranks, and only the outer modules know Optax and Flax."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "tinyjax"
LEVELS = [
    # What knows nothing else of the library.
    ["graph", "layout", "linalg", "atoms", "info", "data", "models", "parity", "plot", "whole", "window", "work"],
    ["equal_values", "liveness", "site", "spectra", "correlations"],
    ["trace"],
    ["rules", "wiring", "slots", "statistics", "schedule", "costs", "shifts", "folding"],
    ["axes", "brakes", "constants", "surgery", "pair", "methods"],
    [
        "differences",
        "uses",
        "meetings",
        "observed",
        "separable",
        "averaging",
        "optimizer",
        "patches",
        "twins",
        "scaling",
    ],
    ["homogeneity", "capture", "flow", "geometry", "activation", "rowsums"],
    ["retracing", "norms", "dimensions", "rowweights", "gating", "slopes", "along"],
    ["scorelayout", "tangent", "census", "mixing"],
    ["bilinear", "states", "stream"],
    ["attention", "recurrence"],
    ["path", "attending", "scores", "writers"],
    ["hidden", "rows"],
    ["kinds", "sums"],
    ["judging"],
    ["sites"],
    ["gates", "thirds"],
    ["patterns", "passes"],
    ["estimate", "births", "moves"],
    ["parts", "diagnosis", "fitting"],
    ["growing", "inputs"],
    ["growth"],
    ["checkpoint", "ranking"],
    ["edges"],
    ["training"],
    ["forecast"],
    ["report"],
]
RANKS = {module: rank for rank, modules in enumerate(LEVELS) for module in modules}
MAY_IMPORT = {
    "optax": {"optimizer", "training"},
    "flax": {"models"},
    "tensorflow_datasets": {"data"},
    "matplotlib": {"plot"},
    "orbax": {"checkpoint"},
}
SEES_NO_NETWORK = {
    "methods": {"linalg", "spectra", "statistics", "whole"},
    "scaling": {"methods", "statistics"},
    "schedule": {"whole"},
    "brakes": {"schedule"},
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
    assert module in RANKS, f"tinyjax/{module} has no rank: add it to LEVELS in {Path(__file__).name}"
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
def test_methods_scaling_and_schedules_never_see_a_network(path):
    module = module_of(path)
    own = {name.split(".")[1] for name in imports(path) if name.startswith("tinyjax.")} - {module}
    assert own <= SEES_NO_NETWORK.get(module, own), f"tinyjax/{module} imports {sorted(own - SEES_NO_NETWORK[module])}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_frameworks_stay_at_the_edge(path):
    roots = {name.split(".")[0] for name in imports(path)}
    for framework, modules in MAY_IMPORT.items():
        assert framework not in roots or module_of(path) in modules, (
            f"tinyjax/{module_of(path)} imports {framework}; only {', '.join(sorted(modules))} may"
        )
