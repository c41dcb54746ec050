"""What a release needs beside the code: the version from git, and how to cite it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A source tree without git."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def version_in(tree: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "hatchling", "version"]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout.strip()


def git(tree: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", *identity, *arguments], cwd=tree, capture_output=True, check=True)


def test_the_version_is_that_of_the_tag(tree: Path) -> None:
    assert version_in(tree) == "0.1.0.dev0"  # no git

    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "one")
    assert version_in(tree) == "0.1.0.dev1"  # no tag

    git(tree, "tag", "v3.2.1")
    assert version_in(tree) == "3.2.1"

    git(tree, "commit", "--allow-empty", "-m", "two")
    assert version_in(tree) == "3.2.2.dev1"


def test_the_citation_names_the_project_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())

    assert {"cff-version", "message", "title", "authors"} <= citation.keys()  # all that the schema requires
    assert citation["authors"] == [{"name": "The lit_mult developers"}]
    (paper,) = citation["references"]
    assert paper["title"] == "Learnable Multipliers: Freeing the Scale of Language Model Matrix Layers"
    assert {"type": "other", "value": "arXiv:2601.04890"} in paper["identifiers"]
    assert [author["family-names"] for author in paper["authors"]][:1] == ["Velikanov"]
