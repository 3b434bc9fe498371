"""How alike pictures are, by features of any network: similarity, drift, diversity.

B pictures, N references, F features; all features have length 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from studio.errors import DataError

#: Cosine of the judge's feature of a picture and a subject's mean direction from which it counts as of that subject.
#: Renderings of other subjects pass one time in a hundred, its own always: all 60 held-out glyphs, 8 references and
#: 8 pictures each in other settings (`studio/comparing/lessons.py`); wrong 0.03 +- 0.17, own 0.89 +- 0.06.
SAME_THING = 0.454


def similarity(drawn: Tensor, references: Tensor, all_pairs: bool = False) -> float:
    """How like the references (N, F) the drawn pictures (B, F) are: cosine in [-1, 1], 1 for the same picture.

    Each drawn picture is compared with the references' mean direction; with `all_pairs` it is the mean over all pairs,
    as Ruiz et al. 2023 have it (DreamBooth, arXiv 2208.12242, section 4.1), which also falls with how unlike the
    references are to each other. By the judge's features, on 64 px renderings of the 60 held-out glyphs, 4 references
    each and 4 pictures on other grounds, the right subject scores 0.85 +- 0.09 and a wrong one 0.03 +- 0.17, 6.06
    spreads apart; the mean over all pairs gives 5.85, the best reference 6.04. A thing on the same ground scores no
    more than on another (0.04 and 0.04 for wrong things), so grounds need no masking; the right thing in a wrong tint
    scores 0.68.
    """
    subject = references.mean(0)
    return float((drawn @ (subject if all_pairs else F.normalize(subject, dim=0))).mean())


def paired_similarity(drawn: Tensor, references: Tensor) -> float:
    """The mean cosine of each drawn picture and its own reference. Raises DataError if they do not pair up."""
    _check_pairs(drawn, references)
    return float((drawn * references).sum(-1).mean())


def similarity_among(references: Tensor, all_pairs: bool = False) -> float:
    """What `similarity` gives for each reference and the others; 1 for a single one."""
    count = len(references)
    if count < 2:
        return 1.0
    others = (references.sum(0) - references) / (count - 1)
    return float((references * (others if all_pairs else F.normalize(others, dim=-1))).sum(-1).mean())


def drift(before: Tensor, after: Tensor) -> float:
    """(1 - cosine) / 2 of pictures without and with the adapter, pair by pair; in [0, 1], 0 for no change.

    The figure of that name in PEFT's comparison of methods for image generation. Raises DataError without pairs.
    """
    _check_pairs(before, after)
    return float((1 - (before * after).sum(-1).clamp(-1, 1)).mean() / 2)


def diversity(features: Tensor) -> float:
    """(1 - cosine) / 2 over all pairs of different pictures of one prompt; in [0, 1]."""
    count = len(features)
    if count < 2:
        raise DataError("diversity compares pictures of one prompt, and there is only one", "draw several seeds")
    cosines = (features @ features.T).clamp(-1, 1)
    return float((1 - (cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1))) / 2)


def _check_pairs(one: Tensor, other: Tensor) -> None:
    if len(one) != len(other):
        raise DataError(f"pictures are compared pair by pair, but there are {len(one)} and {len(other)}")
