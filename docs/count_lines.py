"""Counts lines of code: without blank lines, comments and docstrings.

    python docs/count_lines.py                  # tinyjax, tests, experiments
    python docs/count_lines.py tinyjax/growth

A line counts that holds a token of code; a string that stands alone as a statement is documentation.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path

SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> int:
    """How many lines of a module hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def main() -> None:
    """Prints a line for every folder of the command line."""
    for folder in map(Path, sys.argv[1:] or ["tinyjax", "tests", "experiments"]):
        sources = [path.read_text() for path in sorted(folder.rglob("*.py"))]
        code, total = sum(map(code_lines, sources)), sum(source.count("\n") for source in sources)
        print(f"{folder}: {len(sources)} files, {code} lines of code, {total} lines in all")


if __name__ == "__main__":
    main()
