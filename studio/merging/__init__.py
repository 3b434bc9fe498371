"""Merging adapters: recipe, plan, strategies, and the carrying out."""

from studio.merging.merger import Merger
from studio.merging.plan import Plan, make_plan
from studio.merging.recipe import Part, Recipe, make_recipe, parse_parts, read_recipe
from studio.merging.report import MergeReport
from studio.merging.strategy import strategies

__all__ = [
    "MergeReport",
    "Merger",
    "Part",
    "Plan",
    "Recipe",
    "make_plan",
    "make_recipe",
    "parse_parts",
    "read_recipe",
    "strategies",
]
