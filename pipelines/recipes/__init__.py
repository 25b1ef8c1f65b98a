"""Complete configurations as functions; a person starts from one and overrides dotted keys of it."""

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
    """The recipe of that name; raises ValueError naming the ones there are."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"--recipe {name}: there is no such recipe; {hint}there are {', '.join(RECIPES)}")
    return RECIPES[name]()


__all__ = ["RECIPES", "Recipe", "recipe"]
