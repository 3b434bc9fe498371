"""What a clip network is told beside text and time: given frames, which they are, how fast it plays, whether it loops.

B clips, F frames, Z latent channels (colour, then alpha where the network has it), h and w latent height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

Fill = Literal["blend", "zero"]


@dataclass(frozen=True)
class ClipCondition:
    """`given` (B, Z, F, h, w) latents, read only where `is_given` (B, F) is True; `valid` (B, F) frames that exist.

    `fps` (B,) frames a second, 0 where unknown; `loop` (B,) bool.
    """

    given: Tensor
    is_given: Tensor
    valid: Tensor
    fps: Tensor
    loop: Tensor

    def without_pictures(self) -> ClipCondition:
        """The same request with no frame given."""
        return replace(self, is_given=torch.zeros_like(self.is_given))

    def repeated(self, times: int) -> ClipCondition:
        return ClipCondition(*(torch.cat([value] * times) for value in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        names = ("given", "is_given", "valid", "fps", "loop")
        return {name: getattr(self, name) for name in names}


def joined(parts: list[ClipCondition]) -> ClipCondition:
    """Several batches as one."""
    stacked = [torch.cat(list(column)) for column in zip(*(part.tensors().values() for part in parts))]
    return ClipCondition(*stacked)


def network_input(noisy: Tensor, condition: ClipCondition, fill: Fill) -> Tensor:
    """(B, 2 Z + 1, F, h, w): noisy latents, empty where frames are given; condition latents; the condition mask.

    `blend` fills the condition latents between given frames by linear interpolation and beyond them by the nearest,
    so that the network starts from what it must correct; `zero` leaves them empty, as RDTF does.
    """
    known = condition.is_given & condition.valid
    told = _across(known, noisy)
    given = condition.given.to(noisy).masked_fill(~told, 0)
    open_frames = noisy.masked_fill(told | ~_across(condition.valid, noisy), 0)
    if fill == "blend":
        given = blended(given, known, condition.valid)
    return torch.cat([open_frames, given, told.to(noisy)], 1)


def blended(given: Tensor, known: Tensor, valid: Tensor) -> Tensor:
    """Latents (B, Z, F, h, w) of every valid frame: between known frames their linear blend, outside the nearest."""
    batch, frames = known.shape
    places = torch.arange(frames, device=known.device).expand(batch, -1)
    none = known.logical_not()
    before = places.masked_fill(none, -1).cummax(1).values
    after = places.masked_fill(none, frames).flip(1).cummin(1).values.flip(1)
    left = torch.where(before < 0, after, before).clamp(max=frames - 1)
    right = torch.where(after >= frames, before, after).clamp(min=0)
    share = ((places - left) / (right - left).clamp(min=1)).clamp(0, 1).to(given)
    rows = torch.arange(batch, device=known.device)[:, None]
    by_frame = given.transpose(1, 2)
    weight = share[:, :, None, None, None]
    mixed = (by_frame[rows, left] * (1 - weight) + by_frame[rows, right] * weight).transpose(1, 2)
    usable = valid & known.any(1, keepdim=True)
    return mixed.masked_fill(~_across(usable, given), 0)


def clip_noise(frames: int, shape: Sequence[int], share: float, generator: torch.Generator | None) -> Tensor:
    """Noise (F, *shape) of unit variance, of which each frame has the `share` in common with all frames of its clip.

    A network that draws frame by frame then draws one thing and not F of them (mixed noise, Ge et al. 2023, Preserve
    Your Own Correlation, section 4.2; their a^2 / (1 + a^2) is `share`). Frames are drawn in order, so a longer clip
    begins with a shorter one's noise.
    """
    if not share:
        return torch.randn(frames, *shape, generator=generator)
    common = torch.randn(*shape, generator=generator)
    return share**0.5 * common + (1 - share) ** 0.5 * torch.randn(frames, *shape, generator=generator)


def _across(mask: Tensor, like: Tensor) -> Tensor:
    """A mask over frames (B, F), spread over (B, 1, F, h, w)."""
    return mask[:, None, :, None, None].expand(-1, 1, -1, *like.shape[-2:])


@dataclass(frozen=True)
class Anchor:
    """Where the prediction starts for a clip with given frames: at what these say, and not at nothing.

    `spread` is the standard deviation d of a latent about the blend g of the given frames. Then the best guess of x_0
    from x_t = a x_0 + s e and g alone is (s^2 g + d^2 a x_t) / (s^2 + d^2 a^2), and its error has the standard
    deviation d s / sqrt(s^2 + d^2 a^2): the network is left to predict that error in units of its deviation, as EDM's
    preconditioning has it (Karras et al. 2022, section 5). Clips with nothing given are left to the network alone.
    """

    alphas_cumprod: Tensor
    prediction_type: str
    spread: float

    def joined(self, output: Tensor, noisy: Tensor, time: Tensor, blend: Tensor, told: Tensor) -> Tensor:
        """The prediction (B, Z, F, h, w) from the network's `output`; `told` (B,) clips with given frames."""
        squared = self.alphas_cumprod.to(noisy.device, torch.float32)[time.long().to(noisy.device)]
        a, s = (value.view(-1, 1, 1, 1, 1).to(noisy) for value in (squared.sqrt(), (1 - squared).sqrt()))
        d = self.spread
        variance = s**2 + d**2 * a**2
        guess: dict[str, tuple[Tensor, Tensor]] = {
            "sample": ((s**2 * blend + d**2 * a * noisy) / variance, d * s / variance.sqrt()),
            "epsilon": (s * (noisy - a * blend) / variance, d * a / variance.sqrt()),
            "v_prediction": (s * (a * (1 - d**2) * noisy - blend) / variance, d / variance.sqrt()),
        }
        known, scale = guess[self.prediction_type]
        return torch.where(told.view(-1, 1, 1, 1, 1), known + scale * output, output)


def predicted(
    unet: Any,
    noisy: Tensor,
    time: Tensor,
    text: Tensor,
    condition: ClipCondition,
    fill: Fill,
    anchor: Anchor | None = None,
) -> Tensor:
    """What the network predicts for noisy latents (B, Z, F, h, w): our own network, or a stock one without masks.

    Raises ValueError for padded frames in a network that cannot tell them.
    """
    x = network_input(noisy, condition, fill)
    known = condition.is_given & condition.valid
    if getattr(unet, "masks_frames", False):
        options = {"valid": condition.valid, "fps": condition.fps, "loop": condition.loop}
        anchored = None if anchor is None else known.any(1)
        output = unet(x, time, encoder_hidden_states=text, anchored=anchored, **options).sample
    elif not bool(condition.valid.all()):
        raise ValueError(f"{type(unet).__name__} takes no padded clips; give clips of one length")
    else:
        output = unet(x, time, encoder_hidden_states=text).sample
    if anchor is None:
        return output
    blend = blended(condition.given.to(noisy).masked_fill(~_across(known, noisy), 0), known, condition.valid)
    clean = noisy.masked_fill(~_across(condition.valid, noisy), 0)
    return anchor.joined(output, clean, time, blend, known.any(1))
