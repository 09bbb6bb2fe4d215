"""The house rules that no ordinary linter knows: sizes of files and functions, names, and three of DESIGN's laws.

`python -m tools.lint_budget` prints one line per violation and exits 1 if there are any.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
VAGUE_NAMES = frozenset({"utils", "util", "misc", "common", "helpers"})
CONFIG_DICT_FOLDERS = ("configs", "experiments")
UNFINISHED = re.compile(r"#\s*(TODO|FIXME|XXX|HACK)\b")


def check_file(path: Path, text: str) -> Iterator[str]:
    """Yields `path:line: what is wrong`.

    Args:
      path: relative to the repository root.
      text: content of the file.
    """
    lines = text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield f"{path}:1: {len(lines)} lines, at most {MAX_FILE_LINES}: split it by idea"
    if path.stem in VAGUE_NAMES and path.parts[0] == "gptjax":
        yield f"{path}:1: {path.name} says nothing of what is in it; name the idea"
    for number, line in enumerate(lines, 1):
        if UNFINISHED.search(line):
            yield f"{path}:{number}: finish it, or write down in docs/log.md when it is due"
    tree = ast.parse(text, str(path))
    yield from _check_functions(path, tree)
    if _is_library(path):
        yield from _check_signatures(path, tree)
    yield from _check_names(path, tree)


def _check_functions(path: Path, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{path}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


def _check_signatures(path: Path, tree: ast.Module) -> Iterator[str]:
    """Public functions and methods whose types are not all written; mypy checks those that are."""
    scopes: list[ast.Module | ast.ClassDef] = [tree]
    scopes += [node for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]
    for scope in scopes:
        for node in scope.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_"):
                missing = _untyped(node, is_method=scope is not tree)
                if missing:
                    yield f"{path}:{node.lineno}: {node.name}: no type for {', '.join(missing)}"


def _untyped(node: ast.FunctionDef | ast.AsyncFunctionDef, *, is_method: bool) -> list[str]:
    is_static = any(isinstance(mark, ast.Name) and mark.id == "staticmethod" for mark in node.decorator_list)
    parameters = [*node.args.posonlyargs, *node.args.args][1 if is_method and not is_static else 0 :]
    parameters += [*node.args.kwonlyargs, *filter(None, (node.args.vararg, node.args.kwarg))]
    missing = [parameter.arg for parameter in parameters if parameter.annotation is None]
    return missing + (["the result"] if node.returns is None else [])


def _check_names(path: Path, tree: ast.AST) -> Iterator[str]:
    """`PartitionSpec` outside gptjax/parallel, ConfigDicts past gptjax/config.py, and a second training step."""
    for node in ast.walk(tree):
        name, line = _named(node)
        if name == "PartitionSpec" and _is_library(path) and path.parts[:2] != ("gptjax", "parallel"):
            yield f"{path}:{line}: only gptjax/parallel writes a PartitionSpec; use logical axis names"
        if name == "apply_updates" and _is_library(path) and path.parts[:2] != ("gptjax", "train"):
            yield f"{path}:{line}: only gptjax/train steps an optimizer; give its loop an Objective"
        if name == "ConfigDict" and path.parts[0] not in (*CONFIG_DICT_FOLDERS, "tests"):
            yield f"{path}:{line}: ConfigDicts stop at configs/ and experiments/; take a frozen dataclass"


def _is_library(path: Path) -> bool:
    return path.parts[0] in ("gptjax", "experiments", "configs")


def _named(node: ast.AST) -> tuple[str, int]:
    if isinstance(node, ast.alias):
        return node.name.rpartition(".")[2], node.lineno
    if isinstance(node, ast.Attribute):
        return node.attr, node.lineno
    return "", 0


def main(root: Path) -> int:
    """The number of violations in the Python files that git tracks or would track."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"],
        cwd=root, check=True, capture_output=True, text=True,
    )  # fmt: skip
    paths = [Path(line) for line in sorted(listed.stdout.splitlines()) if (root / line).is_file()]
    problems = [problem for path in paths for problem in check_file(path, (root / path).read_text())]
    print("\n".join(problems) or f"{len(paths)} files within the budget")
    return len(problems)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent) > 0)
