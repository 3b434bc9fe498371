"""The report in plain words: will they disturb each other, how much, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from studio.interference.measure import Tally

APART = 1e-6  # input overlap of adapters in columns of their own: rounding
FAINT, CLEAR = 0.1, 0.5  # crosstalk below which nobody sees it, and above which everybody does
LITTLE, MUCH = 0.05, 0.3  # input overlap, where there are no sketches


def verdict(names: Sequence[str], total: Tally) -> list[str]:
    """Sentences, the most important first."""
    overlap, (i, j) = total.worst(total.input_overlap)
    crosstalk = total.crosstalk
    if float(total.products.sum() - total.products.diagonal().sum()) == 0:
        return ["They change no layer in common: a plain sum leaves each as it is."]
    if crosstalk is None:
        pair = f"'{names[i]}' and '{names[j]}'"
        return [_by_overlap(overlap, pair), "Nothing tells what the layers' inputs are; --calibrate records them."]
    worst, (i, j) = total.worst(crosstalk)
    words = f"on pictures of '{names[i]}', '{names[j]}' acts {worst:.0%} as strongly as '{names[i]}' itself"
    return [_by_crosstalk(worst, words, overlap), *_generic(names, total)]


def _by_crosstalk(worst: float, words: str, overlap: float) -> str:
    if worst < FAINT:
        return f"They barely disturb each other: {words}. A plain sum will do (input overlap {overlap:.2g})."
    if worst < CLEAR:
        return f"They disturb each other noticeably: {words}. Merge them by gram, as auto does."
    return f"They disturb each other strongly: {words}. A plain sum will mix them; merge them by gram, as auto does."


def _by_overlap(overlap: float, pair: str) -> str:
    if overlap < APART:
        return "They read different input directions: in a plain sum each keeps its own to itself."
    if overlap < LITTLE:
        return f"They overlap little (inputs at most {overlap:.2g}, {pair}): a plain sum will probably do."
    if overlap < MUCH:
        return f"They overlap (inputs up to {overlap:.2g}, {pair}): each may show in the other's pictures."
    return f"They overlap much (inputs up to {overlap:.2g}, {pair}): a plain sum will mix them."


def _generic(names: Sequence[str], total: Tally) -> list[str]:
    share = total.generic_share
    if share is None:
        return []
    worst = int(share.argmax())
    text = f"On generic pictures '{names[worst]}' acts {float(share[worst]):.0%} as strongly as on its own"
    drift = total.base_drift
    return [f"{text}, {float(drift[worst]):.1%} of what the layers give." if drift is not None else f"{text}."]
