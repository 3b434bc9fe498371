"""What a layer's inputs are like: their second moments, recorded while the base draws, and sketches of them.

    C = mean of x x^T over the vectors x that the layer's weight is multiplied with

A change D of the weight disturbs the layer by |D C^(1/2)| in the mean: tr(D C D^T) = mean |D x|^2. Merging weighs
concepts by it, and `slots-null` of Orthogonal Adaptation looks for the directions in which C has least.

For a linear layer x is its input (I). For a convolution x is an unfolded patch (I k k) as long as that has no more than
PATCHES_UP_TO numbers; beyond, the channels of one place (I), since C of a 1280-channel 3 x 3 convolution would have
133 million entries. Then mean |D x|^2 over patches is bounded through C (x) 1 over the kernel's places.
I in, k kernel side, q rank of a sketch.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from studio.attachment import Site
from studio.base import Base, Request
from studio.data.cache import Cache
from studio.errors import AdapterError, WorkError
from studio.functional import sides
from studio.patch import LayerShape

PATCHES_UP_TO = 1152  # 128 channels of a 3 x 3 convolution, 5 MiB a matrix
KINDS = ("linear", "conv1d", "conv2d", "conv3d")

#: Names what `base_inputs` draws. Adapters trained apart rely on equal matrices, so another recipe needs another name.
RECIPE = "generic-1"
#: Common things in common settings, which most bases know.
GENERIC_PROMPTS = (
    *("a dog", "a cat, on a blue background", "a red car", "a tree", "a house at the bottom", "a bird at the top"),
    *("a large fish", "a small boat on the left", "an apple, on a green background", "a person", "a flower", ""),
)


@dataclass(frozen=True)
class Gram:
    """`matrix` (I, I), symmetric, fp32: the mean of x x^T over `count` vectors."""

    matrix: Tensor
    count: int


def gram_width(shape: LayerShape) -> int:
    """How many numbers the vectors x of such a layer have."""
    patch = shape.in_features * prod(shape.kernel)
    return patch if patch <= PATCHES_UP_TO else shape.in_features


def input_vectors(x: Tensor, shape: LayerShape) -> Tensor:
    """The vectors that the layer's weight is multiplied with, (rows, gram_width). Groups count as further rows."""
    if shape.kind == "linear":
        return x.reshape(-1, shape.in_features)
    x = x.reshape(-1, shape.in_features, *x.shape[-len(shape.kernel) :])
    if gram_width(shape) == shape.in_features * prod(shape.kernel):
        x = _patches(x, shape)
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _patches(x: Tensor, shape: LayerShape) -> Tensor:
    """(B, I k..., places...), the patches in the layout of the flattened weight."""
    axes = len(shape.kernel)
    x = F.pad(x, sides(shape), mode="constant" if shape.padding_mode == "zeros" else shape.padding_mode)
    for axis, (size, stride, step) in enumerate(zip(shape.kernel, shape.stride, shape.dilation, strict=True)):
        x = x.unfold(2 + axis, (size - 1) * step + 1, stride)[..., ::step]
    x = x.permute(0, 1, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))
    return x.reshape(x.shape[0], -1, *x.shape[2 + axes :])


# -- recording -----------------------------------------------------------------------------------------------------


def record_inputs(
    base: Base,
    sites: Mapping[str, Site],
    prompts: Sequence[str] = GENERIC_PROMPTS,
    seeds: Sequence[int] | None = None,
    steps: int | None = 10,
    on_picture: Callable[[int, int], None] | None = None,
) -> dict[str, Gram]:
    """The second moments of the sites' inputs while the base draws a picture of each prompt, with guidance.

    Adapters and learned words that are on the base take part, so a concept's own inputs are recorded by prompts with
    its word. `seeds` has one seed per prompt, 0, 1, ... by default. Layers that get the very same tensor (q, k and v,
    or all that look at the text) share one matrix. Kept are one fp64 matrix for each different input, and no inputs.
    Sites that are neither linear nor convolutions have no such matrix and are left out; a site that was not reached
    raises WorkError.
    """
    watched = {name: site for name, site in sites.items() if site.shape.kind in KINDS}
    seeds = range(len(prompts)) if seeds is None else seeds
    try:
        return _record(base, watched, prompts, seeds, steps, on_picture, share=True)
    except _InputsDiffer:
        return _record(base, watched, prompts, seeds, steps, on_picture, share=False)


class _InputsDiffer(Exception):
    """Two layers that had one input at first have two later."""


def _record(
    base: Base,
    sites: Mapping[str, Site],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int | None,
    on_picture: Callable[[int, int], None] | None,
    share: bool,
) -> dict[str, Gram]:
    recorder = _Recorder(sites, share)
    try:
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            base.generate(Request([prompt], [seed], steps=steps))
            if on_picture is not None:
                on_picture(number + 1, len(prompts))
    finally:
        recorder.close()
    return recorder.grams()


class _Recorder:
    """Looks at the layers' inputs through forward hooks, which see them before any patch does."""

    def __init__(self, sites: Mapping[str, Site], share: bool) -> None:
        self.sites, self.share = sites, share
        self.leader: dict[str, str] = {}  # site -> the site that has the same input and was reached first
        self.latest: dict[str, tuple[weakref.ref[Tensor], int]] = {}  # leader -> its latest input and the state of it
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.hooks = [
            site.module.register_forward_pre_hook(self._hook(name), with_kwargs=True) for name, site in sites.items()
        ]

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._look(name, args[0] if args else kwargs["input"])

        return hook

    def _look(self, name: str, x: Tensor) -> None:
        if name not in self.leader:
            self.leader[name] = self._find_leader(name, x) if self.share else name
        leader = self.leader[name]
        if leader == name:
            self.latest[name] = (weakref.ref(x), x._version)
            self._add(name, x.detach())
        elif not self._is_latest(leader, x):
            raise _InputsDiffer

    def _find_leader(self, name: str, x: Tensor) -> str:
        like = _geometry(self.sites[name].shape)
        same = (one for one in self.latest if self._is_latest(one, x) and _geometry(self.sites[one].shape) == like)
        return next(same, name)

    def _is_latest(self, leader: str, x: Tensor) -> bool:
        seen, version = self.latest[leader]
        return seen() is x and x._version == version

    def _add(self, name: str, x: Tensor) -> None:
        rows = input_vectors(x, self.sites[name].shape).float()
        moment = (rows.T @ rows).double()  # fp32 within one call, fp64 over the calls
        self.sums[name] = self.sums[name].add_(moment) if name in self.sums else moment
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def grams(self) -> dict[str, Gram]:
        silent = [name for name in self.sites if name not in self.leader]
        if silent:
            raise WorkError(f"{len(silent)} of {len(self.sites)} layers were never reached, first '{silent[0]}'")
        own = {name: Gram(_mean(self.sums.pop(name), count), count) for name, count in self.counts.items()}
        return {name: own[self.leader[name]] for name in self.sites}


def _mean(total: Tensor, count: int) -> Tensor:
    return (total / count).float().cpu()


def _geometry(shape: LayerShape) -> tuple[Any, ...]:
    """All that decides what vectors an input falls into."""
    if shape.kind == "linear":
        return ("linear",)
    kernel = shape.kernel if gram_width(shape) > shape.in_features else ()
    return (shape.in_features, kernel, shape.stride, shape.padding, shape.dilation, shape.padding_mode)


def base_inputs(
    base: Base,
    sites: Mapping[str, Site],
    cache: Cache,
    prompts: Sequence[str] = GENERIC_PROMPTS,
    steps: int = 10,
    recipe: str = RECIPE,
) -> dict[str, Tensor]:
    """The second moments (I, I) of the sites' inputs on the base alone; kept in the cache, each once.

    `recipe` names the prompts and steps. Layers that share their input get the very same tensor.
    """

    def compute() -> dict[str, Tensor]:
        grams = record_inputs(base, sites, prompts, steps=steps)
        distinct = {id(gram): gram.matrix for gram in grams.values()}
        places = {key: place for place, key in enumerate(distinct)}
        index = torch.tensor([places[id(gram)] for gram in grams.values()])
        return {"index": index, **{str(place): matrix for place, matrix in enumerate(distinct.values())}}

    identity = base.identity()
    names = [name for name, site in sites.items() if site.shape.kind in KINDS]
    key = "|".join(("inputs", identity.architecture, identity.values, recipe, *names))
    found = cache.get(key, compute)
    return {name: found[str(int(place))] for name, place in zip(names, found["index"], strict=True)}


# -- directions ----------------------------------------------------------------------------------------------------


def low_energy_space(matrix: Tensor, dimensions: int) -> tuple[Tensor, float]:
    """(I, dimensions), fp64: orthonormal directions of least energy, and the greatest energy among them."""
    energies, directions = torch.linalg.eigh(matrix.double())
    return directions[:, :dimensions], max(0.0, float(energies[dimensions - 1]))


@dataclass(frozen=True)
class Sketch:
    """C as low rank and the same energy everywhere else:  C ~ V diag(e) V^T + r (1 - V V^T).

    `basis` V (I, q) orthonormal, `energies` e (q,) falling, `residual` r (). C itself is closest to it in the Frobenius
    norm among all with these V and e, has the same trace, and differs in the spectral norm by no more than e's last.
    """

    basis: Tensor
    energies: Tensor
    residual: Tensor

    @property
    def captured(self) -> float:
        """The fraction of C's trace that V holds."""
        held = float(self.energies.double().sum())
        rest = float(self.residual) * (self.basis.shape[0] - self.basis.shape[1])
        return held / (held + rest) if held + rest > 0 else 1.0

    def times(self, x: Tensor) -> Tensor:
        """C x for x (I, n), without building C."""
        basis = self.basis.to(x.dtype)
        inside = basis.T @ x
        return basis @ ((self.energies.to(x) - self.residual.to(x))[:, None] * inside) + self.residual.to(x) * x

    def matrix(self) -> Tensor:
        """C, (I, I), fp32."""
        return self.times(torch.eye(self.basis.shape[0], device=self.basis.device))

    def tensors(self, dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
        """As an adapter file holds it, under `<site>.sketch.<name>`; `dtype` is the basis's."""
        return {
            "basis": self.basis.to(dtype).contiguous(),
            "energies": self.energies.float().contiguous(),
            "residual": self.residual.float().reshape(1),
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Sketch:
        """From a file's tensors. Raises AdapterError if they are no sketch."""
        try:
            basis, energies, residual = (tensors[name].float() for name in ("basis", "energies", "residual"))
        except KeyError as missing:
            raise AdapterError(f"a sketch of inputs has no '{missing.args[0]}'") from None
        fits = basis.ndim == 2 and energies.shape == basis.shape[1:] and residual.numel() == 1
        if not fits:
            raise AdapterError(f"a sketch of inputs has shapes that do not fit: {tuple(basis.shape)} for its basis")
        return cls(basis, energies, residual.reshape(()))


def sketch(gram: Gram | Tensor, rank: int) -> Sketch:
    """The `rank` directions of most energy, and the mean energy of all others.

    Every direction if `rank` is not below I; then it is C itself, to rounding.
    """
    matrix = (gram.matrix if isinstance(gram, Gram) else gram).double()
    width = len(matrix)
    kept = min(rank, width)
    largest, directions = _leading(matrix, kept)
    rest = width - kept
    residual = (matrix.trace() - largest.sum()).clamp(min=0) / rest if rest else torch.zeros((), dtype=torch.float64)
    return Sketch(directions.float(), largest.float(), residual.float())


WHOLE_UP_TO = 512  # an eigendecomposition of more takes seconds on one core
ROUNDS = 8


def _leading(matrix: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest energies, falling, and their directions; those of a wide matrix by subspace iteration.

    The iteration gives orthonormal directions that hold a little less energy than the best ones: 6e-4 of the trace less
    for energies that fall by a factor of 1000 over 768 directions, slower than those of inputs do.
    """
    width = len(matrix)
    wider = count + 16
    if width <= WHOLE_UP_TO or 4 * wider > width:
        energies, directions = torch.linalg.eigh(matrix)
        return energies.flip(0)[:count].clamp(min=0), directions.flip(1)[:, :count]
    basis = torch.randn(width, wider, dtype=matrix.dtype, generator=torch.Generator().manual_seed(0))
    for _ in range(ROUNDS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    energies, turn = torch.linalg.eigh(basis.T @ matrix @ basis)
    return energies.flip(0)[:count].clamp(min=0), (basis @ turn).flip(1)[:, :count]


def sketches_in(tensors: Mapping[str, Tensor]) -> dict[str, Sketch]:
    """The sketches among an adapter file's tensors, by site. Raises AdapterError for a broken one."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        site, found, name = key.rpartition(".sketch.")
        if found:
            parts.setdefault(site, {})[name] = value
    return {site: Sketch.of(own) for site, own in parts.items()}
