"""The Python interface: the same work as the command line, as functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from studio.adapter import Adapter
from studio.base import Base, Request
from studio.bases.registry import load_base
from studio.generation import Use, parse_use, wearing
from studio.run import Event

__all__ = ["attach", "export", "generate", "load_base", "merge", "train"]


def train(preset: str, **request: Any) -> Iterator[Event]:
    """Trains and yields events. Keywords are the fields of `studio.training.Order`: data, base, method, name, ..."""
    from studio.training import Order, plan

    yield from plan(Order(preset, **request)).events()


@contextmanager
def attach(base: Base, *adapters: str) -> Iterator[Base]:
    """Inside, `base` (and its `pipe`) has the adapters on, each `NAME|FILE[:WEIGHT]`; outside it is as before."""
    with wearing(base, [parse_use(text) for text in adapters]):
        yield base


def generate(
    prompt: str,
    *,
    base: str | None = None,
    adapters: tuple[str, ...] = (),
    regions: tuple[str, ...] = (),
    seed: int = 0,
    count: int = 1,
) -> list[Any]:
    """Pictures of a prompt, with seeds from `seed` on. Without `base`, that of the first adapter.

    `regions` are texts as `--region` takes them: "0,0,0.5,1:my-cat:a mycat"; elsewhere the prompt is drawn.
    """
    from studio.regions.drawing import drawing
    from studio.regions.layout import Layout, parse_region

    uses = [parse_use(text) for text in adapters]
    layout = Layout(tuple(map(parse_region, regions)))
    loaded = load_base(base or next((use.base for use in (*uses, *layout.uses)), "sticker"))
    with drawing(loaded, layout, uses) if regions else wearing(loaded, uses):
        return loaded.generate(Request([prompt] * count, list(range(seed, seed + count))))


def export(adapter: str | Adapter, to: str, out: str | Path, **options: Any) -> Any:
    """Writes an adapter in another program's format and proves it by reloading; returns the report."""
    from studio.exporting import export_adapter

    use = Use("adapter", adapter) if isinstance(adapter, Adapter) else parse_use(adapter)
    return export_adapter(use.adapter, load_base(use.base), to, Path(out), **options)


def merge(adapters: Mapping[str, float | dict[str, Any]] | Sequence[str], strategy: str = "auto", **recipe: Any) -> Any:
    """A merge, checked and not yet computed: `.save(path)` writes it, `.adapter()` gives it, `.report` tells of it.

    `adapters` maps names, files or PEFT folders to weights, or to `{"weight": ..., "blocks": {...}}`; further keywords
    are fields of `studio.merging.Recipe`. Raises RequestError.
    """
    from studio.merging import Merger, make_plan, make_recipe

    given = dict(adapters) if isinstance(adapters, Mapping) else list(adapters)
    return Merger(make_plan(make_recipe({"adapters": given, "strategy": strategy, **recipe})))
