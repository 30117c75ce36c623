"""Builds the API pages: `make docs`, or `python docs/pages.py FOLDER`; then open FOLDER/index.html.

One page for the front page and one for each room, with formulas set by MathJax. What is public is what an `__init__`
hands on, or what the modules `costs`, `forecast` and `cost_model` define; everything else is machinery and has no page.
"""

import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

ROOMS = "methods models data plot core statistics surgery growth growth.optimizer analysis training training.checkpoint"
MODULE_NAMES = "training.schedules training.schedules.costs training.forecast training.cost_model"
NAMES = ("tinyjax", *(f"tinyjax.{name}" for name in f"{ROOMS} {MODULE_NAMES}".split()))
MODULES = tuple(map(importlib.import_module, NAMES))


def public(module: ModuleType) -> dict[str, Any]:
    """The functions and classes that a module offers, by name."""
    found = {name: value for name, value in vars(module).items() if not name.startswith("_") and callable(value)}
    ours = {name: value for name, value in found.items() if getattr(value, "__module__", "").startswith("tinyjax")}
    if hasattr(module, "__path__"):
        return ours
    return {name: value for name, value in ours.items() if value.__module__ == module.__name__}


def build(folder: Path) -> list[Path]:
    """Writes the pages and returns their files."""
    import pdoc
    import pdoc.render

    for module in MODULES:
        # pdoc takes re-exported names for private unless a module lists them.
        vars(module)["__all__"] = list(public(module))
    pdoc.render.configure(docformat="google", math=True, show_source=True, search=True)
    pdoc.pdoc(*NAMES, output_directory=folder)
    return [folder / f"{name.replace('.', '/')}.html" for name in NAMES]


def main() -> None:
    """Builds the pages into the folder of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("docs/api"))
    for page in build(parser.parse_args().folder):
        print(f"{page}: {page.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
