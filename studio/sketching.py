"""What an adapter's file tells of its layers' inputs, so that merging by least squares needs neither base nor data.

After a training the base draws a few pictures of the concept with the adapter on, and of generic things with it off;
the second moments of what each layer was given then are kept as sketches (inputs.py), `<site>.sketch.*` and
`<site>.base_sketch.*`. Layers with one input, as q, k and v of a block, have one sketch: the card says which. Sketches
are of generated pictures, and tell of the training's pictures only what those show.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from studio.attachment import Site
from studio.base import Base
from studio.data.cache import Cache
from studio.inputs import GENERIC_PROMPTS, Gram, base_inputs, record_inputs, sketch

#: A concept in common settings; {} is its word.
CONCEPT_PROMPTS = ("a {}", "a {} on the left", "a large {}", "a small {}, on a blue background")
STEPS = 5  # sampling steps of each picture; a calibration takes twice as many
RECIPE = "generic-sketch-1"  # names what `generic_inputs` draws, in the cache

Named = dict[str, Tensor]  # by full name in the file


def concept_inputs(base: Base, sites: Mapping[str, Site], word: str, steps: int = STEPS) -> dict[str, Gram]:
    """The inputs of the sites while the base draws what `word` calls, with whatever adapters are on it."""
    return record_inputs(base, sites, [prompt.format(word) for prompt in CONCEPT_PROMPTS], steps=steps)


def generic_inputs(base: Base, sites: Mapping[str, Site], cache: Cache) -> dict[str, Tensor]:
    """The inputs of the sites while the base alone draws common things: half of what `base_inputs` draws by default."""
    return base_inputs(base, sites, cache, GENERIC_PROMPTS[::2], STEPS, RECIPE)


def sketches_of(concept: Mapping[str, Gram], generic: Mapping[str, Tensor], rank: int) -> tuple[dict[str, str], Named]:
    """(who shares whose sketch, the sketches' tensors). Every site is in the first: site -> the site that has it."""
    holder: dict[tuple[int, int], str] = {}
    shared: dict[str, str] = {}
    tensors: Named = {}
    for site, gram in concept.items():
        one = (id(gram), id(generic[site]))
        if one not in holder:
            holder[one] = site
            for term, matrix in (("sketch", gram.matrix), ("base_sketch", generic[site])):
                tensors |= {f"{site}.{term}.{name}": value for name, value in sketch(matrix, rank).tensors().items()}
        shared[site] = holder[one]
    return shared, tensors
