"""Recipes by name: the settings of papers and their code bases, one commented YAML each, shipped with the package."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def list_recipes() -> dict[str, str]:
    """The names that `formix train` takes, each with the first line of its file."""
    files = sorted(_FOLDER.glob("*.yaml"))
    return {file.stem: file.read_text(encoding="utf-8").splitlines()[0].lstrip("# ") for file in files}


def recipe_path(name: str) -> Path:
    """The file of a recipe.

    Raises:
        ValueError: no such recipe.
    """
    path = _FOLDER / f"{name}.yaml"
    if name not in list_recipes():
        raise ValueError(f"{name!r} is no recipe; there are {', '.join(list_recipes())}.")
    return path
