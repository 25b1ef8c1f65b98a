"""Complete configurations as functions; users start from one and override its dotted keys."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from pipelines.recipes.paper import paper, paper_medmnist
from pipelines.recipes.recipe import Recipe
from pipelines.recipes.small import bccd, breastmnist, pneumoniamnist, quickstart

RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__.replace("_", "-"): recipe
    for recipe in (quickstart, breastmnist, pneumoniamnist, bccd, paper_medmnist, paper)
}


def recipe(name: str) -> Recipe:
    """The recipe of that name; raises ValueError with the available names."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--recipe {name}: unknown recipe; {hint}available: {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "recipe"]
