"""From results to tables: mean and spread of each cell, its distance from the baseline, floors and ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from studio.comparing.study import Study

Result = dict[str, Any]

#: column -> (heading, where in the card, digits); the names of figures are those of `studio evaluate`
COLUMNS: dict[str, tuple[str, str, str]] = {
    "num_trainable_params": ("parameters", "training", ",.0f"),
    "file_size": ("file, kB", "training", ",.0f"),
    "judge_similarity": ("similarity", "figures", ".3f"),
    "clip_similarity": ("CLIP-I", "figures", ".3f"),
    "clip_text": ("CLIP-T", "figures", ".3f"),
    "dino_similarity": ("DINO", "figures", ".3f"),
    "palette_similarity": ("colours", "figures", ".3f"),
    "held_out_loss": ("held-out loss", "figures", ".3f"),
    "in_scale": ("in scale", "figures", ".3f"),
    "mode_likelihood": ("mode, nats a frame", "figures", ".3f"),
    "mode_margin": ("over other modes, nats", "figures", ".3f"),
    "mode_right": ("mode right", "figures", ".2f"),
    "direction": ("direction kept", "figures", ".3f"),
    "ornament_distance": ("ornaments off by", "figures", ".3f"),
    "frechet": ("Frechet distance", "figures", ".1f"),
    "rhythm": ("rhythm", "figures", ".2f"),
    "tempo_right": ("tempo right", "figures", ".2f"),
    "instrument_right": ("instrument right", "figures", ".2f"),
    "clap_text": ("CLAP-T", "figures", ".3f"),
    "known_in_scale": ("known keys in scale", "figures", ".3f"),
    "ground_right": ("ground right", "figures", ".2f"),
    "position_right": ("place right", "figures", ".2f"),
    "glyph_right": ("thing right", "figures", ".2f"),
    "drift": ("drift", "figures", ".3f"),
    "glyphs_kept": ("unrelated kept", "figures", ".2f"),
    "diversity": ("diversity", "figures", ".3f"),
    "step_seconds": ("s/step", "training", ".3f"),
    "accelerator_memory_max": ("peak, MiB", "training", ",.0f"),
}
UNITS = {"file_size": 1e3, "accelerator_memory_max": 2**20}
LEADING = ("dino_similarity", "judge_similarity", "clip_similarity", "palette_similarity", "mode_right")

KINDS = {"subject": "Subjects", "style": "Styles", "raga": "Ragas", "makam": "Makams", "western": "Keys"}


@dataclass(frozen=True)
class Summary:
    """A figure over seeds and lessons. `spread` is the standard deviation; `count` how many there are."""

    mean: float
    spread: float
    count: int

    def text(self, digits: str) -> str:
        return format(self.mean, digits) + (f" ± {format(self.spread, digits)}" if self.spread else "")


def summary(values: Iterable[float]) -> Summary | None:
    found = list(values)
    if not found:
        return None
    return Summary(statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0, len(found))


def figure(result: Result, column: str, suffix: str = "") -> float | None:
    """A figure of a result, in the unit of its column."""
    value = result["card"].get(COLUMNS[column][1], {}).get(column + suffix)
    return None if value is None else float(value) / UNITS.get(column, 1)


def leading(results: Sequence[Result]) -> str:
    """The column that says how well the lesson was learned."""
    there = [column for column in LEADING if any(figure(result, column) is not None for result in results)]
    return there[0] if there else LEADING[0]


def of_kind(results: Sequence[Result], kind: str, **facts: Any) -> list[Result]:
    return [r for r in results if r["kind"] == kind and all(r.get(key) == value for key, value in facts.items())]


def summarised(results: Sequence[Result], suffix: str = "") -> dict[str, Summary]:
    """By column, over all these results."""
    found = {column: [figure(result, column, suffix) for result in results] for column in COLUMNS}
    made = {column: summary(v for v in values if v is not None) for column, values in found.items()}
    return {column: value for column, value in made.items() if value is not None}


def compared(study: Study, results: Sequence[Result], kind: str) -> list[Result]:
    """The trainings of a kind of lesson, without those that were only made for sums."""
    taught = {cell.name: set(study.taught_to(cell)) for cell in study.cells}
    return [r for r in of_kind(results, "training", lesson_kind=kind) if r["lesson"] in taught.get(r["cell"], ())]


def one_each(results: Sequence[Result]) -> list[Result]:
    """The first result of each lesson: what the base does alone is the same for all that learned it."""
    return list({r["lesson"]: r for r in reversed(results)}.values())


def paired_difference(results: Sequence[Result], baseline: Sequence[Result], column: str) -> Summary | None:
    """How much better than the baseline on the same lesson with the same seed; lessons' own difficulty drops out."""
    known = {(r["lesson"], r["seed"]): figure(r, column) for r in baseline}
    pairs = [(figure(r, column), known.get((r["lesson"], r["seed"]))) for r in results]
    return summary(own - other for own, other in pairs if own is not None and other is not None)


# -- tables --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    title: str
    head: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [f"## {self.title}", "", f"| {' | '.join(self.head)} |", f"|{'---|' * len(self.head)}"]
        return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in self.rows), ""])


def tables(study: Study, results: Sequence[Result]) -> list[Table]:
    """All tables for which there are results."""
    made = [_cells(study, results, kind, title) for kind, title in KINDS.items()]
    made += [_by_lesson(study, results), _sums(study, results), *merged(study, results), _zeroed(results)]
    return [table for table in made if table is not None]


def _cells(study: Study, results: Sequence[Result], kind: str, title: str) -> Table | None:
    trained = compared(study, results, kind)
    if not trained:
        return None
    own = {cell.name: of_kind(trained, "training", cell=cell.name) for cell in study.cells}
    shown = [column for column in COLUMNS if column in summarised(trained)]
    lead = leading(trained)
    head = ["cell", *(COLUMNS[column][0] for column in shown), f"{COLUMNS[lead][0]} over {study.cells[0].name}", "n"]

    def row(name: str, found: dict[str, Summary], difference: Summary | None, count: int) -> list[str]:
        cells = [found[c].text(COLUMNS[c][2]) if c in found else "" for c in shown]
        return [
            name,
            *cells,
            "" if difference is None else f"{difference.text('+.3f')}".replace("± +", "± "),
            str(count),
        ]

    rows = [
        *(row(f"*{name} alone*", _floor(found), None, len(found)) for name, found in by_base(trained).items()),
        *_described(results, kind, row),
        row("*references*", summarised(one_each(trained), "_references"), None, len(one_each(trained))),
    ]
    baseline = own[study.cells[0].name]
    rows += [
        row(
            name,
            summarised(found),
            paired_difference(found, baseline, lead) if found is not baseline else None,
            len(found),
        )
        for name, found in own.items()
        if found
    ]
    return Table(title, head, [r for r in rows if any(r[1:-1])])


def by_base(trained: Sequence[Result]) -> dict[str, list[Result]]:
    """A result of each lesson for each base, by the base's name if there are several."""
    bases = list(dict.fromkeys(r.get("base", "") for r in trained))
    of_base = [one_each([r for r in trained if r.get("base", "") == base]) for base in bases]
    return dict(zip(bases if len(bases) > 1 else ["base"], of_base))


def _floor(trained: Sequence[Result]) -> dict[str, Summary]:
    """The base alone: nothing drifts, and all that it draws is kept."""
    found = summarised(trained, "_base")
    return found | {"drift": Summary(0.0, 0.0, len(trained)), "glyphs_kept": Summary(1.0, 0.0, len(trained))}


def _described(results: Sequence[Result], kind: str, row: Callable[..., list[str]]) -> list[list[str]]:
    found = of_kind(results, "described", lesson_kind=kind)
    if not found:
        return []
    figures = summarised(found) | {"drift": Summary(0.0, 0.0, len(found)), "glyphs_kept": Summary(1.0, 0.0, len(found))}
    return [row("*base alone, asked for the nearest thing it knows*", figures, None, len(found))]


def _by_lesson(study: Study, results: Sequence[Result]) -> Table | None:
    """The leading figure by lesson, since lessons differ more than methods do."""
    trained = of_kind(results, "training")
    lessons = [name for name in study.lessons if any(r["lesson"] == name for r in trained)]
    if len(lessons) < 2:
        return None
    rows = []
    for cell in study.cells:
        own = of_kind(trained, "training", cell=cell.name)
        if own:
            rows.append([cell.name, *(_lead_text(of_kind(own, "training", lesson=name)) for name in lessons)])
    name = COLUMNS[leading(trained)][0]
    return Table(f"{name[0].upper()}{name[1:]} by lesson", ["cell", *lessons], rows)


def _lead_text(results: Sequence[Result]) -> str:
    found = summarised(results).get(leading(results)) if results else None
    return found.text(".3f") if found else ""


def _sums(study: Study, results: Sequence[Result]) -> Table | None:
    summed = of_kind(results, "sum")
    if not summed:
        return None
    keys = dict.fromkeys((r["concepts"], r["weight"]) for r in summed)
    columns = sorted(keys, key=lambda key: (-key[1], key[0]))
    rows = []
    for cell in study.cells:
        own = of_kind(summed, "sum", cell=cell.name)
        if own:
            measured = {(r["lesson"], r["seed"]) for r in own}
            alone = [r for r in of_kind(results, "training", cell=cell.name) if (r["lesson"], r["seed"]) in measured]
            groups = [of_kind(own, "sum", concepts=count, weight=weight) for count, weight in columns]
            rows.append([cell.name, _lead_text(alone), *map(_lead_text, groups)])
    head = ["cell", "one alone", *(f"{count} at {weight:g}" for count, weight in columns)]
    return Table("Concepts summed: similarity of each beside the others", head, rows)


# -- merges --------------------------------------------------------------------------------------------------------

MERGED = {"identity": ("identity", ".2f"), "similarity": ("similarity", ".2f"), "loss_rise": ("base drift", ".1%")}
IN_ONE_PICTURE = {
    "in_place": ("in place", ".2f"),
    "both_in_place": ("both in place", ".2f"),
    "swapped": ("in the other's place", ".2f"),
    "missing": ("missing", ".2f"),
    "similarity": ("similarity", ".2f"),
}


def way_figure(results: Sequence[Result], way: str, column: str) -> Summary | None:
    """A figure of one way over the seeds of these results."""
    return summary(r["card"]["ways"][way][column] for r in results if way in r["card"]["ways"])


def merged(study: Study, results: Sequence[Result]) -> Iterator[Table]:
    """For each cell: every way at every size, its share of what one adapter alone reaches; then two in a picture."""
    ways = list(dict.fromkeys(way.title for group in study.merges for way in group.ways))
    for cell in study.cells:
        found = of_kind(results, "concepts", cell=cell.name)
        if found:
            yield _merged_of(cell.name, ways, found)
    paired = of_kind(results, "pairs")
    if paired:
        head = ["cell", "way", *(title for title, _ in IN_ONE_PICTURE.values()), "n"]
        rows = []
        for cell in study.cells:
            own = of_kind(paired, "pairs", cell=cell.name)
            for way in [*ways, "regions"] if own else ():
                figures = [(way_figure(own, way, column), digits) for column, (_, digits) in IN_ONE_PICTURE.items()]
                rows.append([cell.name, way, *(f.text(d) if f else "" for f, d in figures), str(len(own))])
        yield Table("Two concepts in one picture", head, rows)


def _merged_of(cell: str, ways: Sequence[str], found: Sequence[Result]) -> Table:
    sizes = sorted({r["concepts"] for r in found})
    alone = of_kind(found, "concepts", concepts=1)
    head = ["way", *(f"{title}, K = {size}" for size in sizes for title, _ in MERGED.values()), "seeds"]
    rows = []
    for way in ("alone", *ways):
        cells = []
        for size in sizes:
            own = of_kind(found, "concepts", concepts=size)
            for column, (_, digits) in MERGED.items():
                figure = way_figure(own, way, column)
                cells.append(figure.text(digits) if figure else "")
        rows.append([way, *cells, str(len({r["seed"] for r in (alone if way == "alone" else found)}))])
    return Table(f"Concepts merged: {cell}", head, rows)


def _zeroed(results: Sequence[Result]) -> Table | None:
    zeroed = sorted(of_kind(results, "zeroed"), key=lambda r: r["share"])
    if not zeroed:
        return None
    names = list(zeroed[0]["card"]["figures"])
    rows = [
        [f"{r['share']:.0%}", f"{r['card']['threshold']:.2e}", *(f"{r['card']['figures'][n]:.3f}" for n in names)]
        for r in zeroed
    ]
    head = ["smallest weights zeroed", "threshold", *(name.replace("_", " ") for name in names)]
    return Table(f"The base without its smallest weights ({zeroed[0]['card']['pictures']} pictures)", head, rows)
