"""Notebooks are pairs of a notebook without outputs and a script, which jupytext keeps alike; nbmake runs them."""

from __future__ import annotations

import ast
from pathlib import Path

import jupytext
import nbformat
import pytest

import lit_mult

FOLDER = Path(__file__).parents[1] / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def test_every_notebook_has_a_script() -> None:
    assert len(NAMES) == 4
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script_and_holds_no_outputs(name: str) -> None:
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    script = jupytext.read(FOLDER / f"{name}.py")
    cells = [[(cell.cell_type, cell.source) for cell in pair.cells] for pair in (notebook, script)]
    assert cells[0] == cells[1], f"jupytext --sync notebooks/{name}.py"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not [cell for cell in code if cell.outputs or cell.execution_count]


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_uses_the_public_names_alone(name: str) -> None:
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert "lit_mult" in imported
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in imported | modules if str(module).startswith("lit_mult.")]
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_package(node.value)}
    assert used <= set(lit_mult.__all__)


def _is_package(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id == "lit_mult"
