"""Training whole networks: how the bundled bases are made.

Two stages, as for any latent diffusion model (Rombach et al. 2022): the autoencoder on pixels, then the denoiser
together with the text encoder on its latents. The same loop, events and checkpoints as everything else.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor, nn

from studio.base import Request
from studio.bases.halves import save_with_halves
from studio.bases.latent_diffusion import LatentDiffusion
from studio.bases.registry import load_base
from studio.bases.sticker import build_sticker
from studio.data.sticker_pool import StickerPool, draw, draw_crop, to_pixels
from studio.errors import PresetError
from studio.fit import Group, Task
from studio.keyed import torch_generator
from studio.method import Method, register
from studio.preset import Preset
from studio.run import Event, Run
from studio.samples import save_picture

VALIDATION_PICTURES = 64


@register
class Scratch(Method):
    """Trains networks whole, from random weights or from those of a pipeline folder."""

    kind: Literal["scratch"] = "scratch"
    paper = "Rombach et al. 2022, High-Resolution Image Synthesis with Latent Diffusion Models, arXiv 2112.10752"
    train: Literal["autoencoder", "denoiser"] = Field(
        "denoiser", description="The autoencoder, or the denoiser together with its text encoder."
    )
    init_from: str | None = Field(None, description="Pipeline folder to take weights from. Default: random weights.")
    fresh: tuple[str, ...] = Field((), description="Networks that start at random although init_from has them.")
    kl_weight: float = Field(1e-4, ge=0, description="Autoencoder: weight of the mean KL divergence per latent number.")

    def base(self, preset: Preset) -> LatentDiffusion:
        """The networks to begin with: random, or those of `init_from`. Raises PresetError, BaseError."""
        if preset.base != "sticker":
            raise PresetError(f"there is no blueprint of a base '{preset.base}'", "there is: sticker")
        base = build_sticker(preset.seed)
        if self.init_from is not None:
            trained = load_base(self.init_from, dtype=torch.float32, device="cpu")
            taken = {name: module for name, module in trained.modules.items() if name not in self.fresh}
            if "text_encoder" in taken:
                taken["tokenizer"] = trained.pipe.tokenizer  # its ids are what the text encoder was learned for
            base.pipe.register_modules(**taken)
        return base

    def task(self, base: LatentDiffusion, preset: Preset, run: Run) -> AutoencoderTask | DenoiserTask:
        if preset.data.source != "stickers":
            raise PresetError("method 'scratch' draws its own data", "set data.source=stickers")
        return (AutoencoderTask if self.train == "autoencoder" else DenoiserTask)(self, base, preset, run)


class _NetworkTask(Task):
    """What both stages share: the networks, the data's settings, saving."""

    networks: tuple[str, ...]

    def __init__(self, method: Scratch, base: LatentDiffusion, preset: Preset, run: Run) -> None:
        self.method, self.base, self.preset, self.run = method, base, preset, run
        self.resolution = preset.data.resolution or base.resolution
        self.modules = {name: base.modules[name] for name in self.networks}
        for module in self.modules.values():
            module.requires_grad_(True).train()

    def groups(self) -> list[Group]:
        named: dict[str, nn.Parameter] = {}
        for name, module in self.modules.items():
            named |= {f"{name}.{key}": value for key, value in module.named_parameters()}
        return [Group(named)]

    def describe(self, step: int, micro: int, slots: range) -> str:
        return f"stickers of seed {self.preset.seed}, slots {slots.start} to {slots.stop - 1}"

    def save(self, folder: Path, step: int) -> Path:
        save_with_halves(self.base.pipe, folder / "base")
        return folder / "base"

    def _validation_pictures(self) -> Tensor:
        keys = [("validation", i) for i in range(VALIDATION_PICTURES)]
        return to_pixels([draw(key, self.base.resolution, "held-out")[0] for key in keys])


class AutoencoderTask(_NetworkTask):
    """Reconstruction: squared error + 0.5 absolute error + KL, on renderings or crops of them."""

    networks = ("vae",)

    def __init__(self, method: Scratch, base: LatentDiffusion, preset: Preset, run: Run) -> None:
        super().__init__(method, base, preset, run)
        if (preset.data.crop or 0) > self.resolution:
            raise PresetError(f"data.crop={preset.data.crop} does not fit into pictures of {self.resolution} px")

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        data, seed = self.preset.data, self.preset.seed
        keys = [(seed, step, micro, slot) for slot in slots]
        if data.crop:
            pictures = [draw_crop(key, self.resolution, data.glyphs, data.crop) for key in keys]
        else:
            pictures = [draw(key, self.resolution, data.glyphs)[0] for key in keys]
        pixels = to_pixels(pictures).to(self.base.device)
        vae = self.base.pipe.vae
        latents = vae.encode(pixels).latent_dist
        noise = torch.stack([torch.randn(latents.mean.shape[1:], generator=torch_generator(*key)) for key in keys])
        error = vae.decode(latents.mean + latents.std * noise.to(latents.mean)).sample.float() - pixels
        kl = 0.5 * (latents.mean.float() ** 2 + latents.var.float() - 1 - latents.logvar.float())
        return (error**2 + 0.5 * error.abs()).mean((1, 2, 3)) + self.method.kl_weight * kl.mean((1, 2, 3))

    def validation_loss(self) -> float:
        """Mean squared error on glyphs that no network is trained on; PSNR is 6.02 - 10 log10 of it."""
        pixels = self._validation_pictures().to(self.base.device)
        return float((self._reconstructed(pixels) - pixels).square().mean())

    def _reconstructed(self, pixels: Tensor) -> Tensor:
        vae = self.base.pipe.vae
        with torch.no_grad():
            return vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)

    def draw_samples(self, step: int) -> Iterator[Event]:
        pixels = self._validation_pictures()[:8].to(self.base.device)
        rows = torch.cat([torch.cat(list(part), -1) for part in (pixels, self._reconstructed(pixels))], -2)
        yield save_picture(self.run, rows, step, 0, "held-out stickers above, their reconstructions below", 0)

    def save(self, folder: Path, step: int) -> Path:
        """Also measures the latents' spread, which the denoiser wants to be 1."""
        with torch.no_grad():
            latents = self.base.pipe.vae.encode(self._validation_pictures().to(self.base.device)).latent_dist.mode()
        self.base.pipe.vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4))
        return super().save(folder, step)


class DenoiserTask(_NetworkTask):
    """Denoising of encoded renderings, with the text encoder trained along."""

    networks = ("unet", "text_encoder")

    def __init__(self, method: Scratch, base: LatentDiffusion, preset: Preset, run: Run) -> None:
        super().__init__(method, base, preset, run)
        data = preset.data
        self.pool = StickerPool(base.encode_pictures, self._picture, data.pool, data.refresh, preset.seed)

    def _picture(self, key: tuple[object, ...]) -> tuple[Image.Image, str]:
        data = self.preset.data
        return draw(key, self.resolution, data.glyphs, data.alone, data.fill)

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        latents, captions = self.pool.batch(step, micro, slots)
        return self._loss(latents, captions, [(self.preset.seed, step, micro, slot) for slot in slots])

    def _loss(self, latents: Tensor, captions: list[str], keys: list[tuple]) -> Tensor:
        objective = self.base.objective
        generators = [torch_generator("noise", *key) for key in keys]
        dropout = self.preset.data.caption_dropout
        captions = ["" if float(torch.rand((), generator=g)) < dropout else c for g, c in zip(generators, captions)]
        times = torch.stack([objective.draw_time(g) for g in generators])
        noise = torch.stack([torch.randn(latents.shape[1:], generator=g) for g in generators]).to(self.base.device)
        clean = latents.to(self.base.device)
        size = (self.resolution, self.resolution)
        condition = self.base.encode_prompts(captions, size)
        noisy, target = objective.noised(clean, noise, times), objective.target(clean, noise, times)
        error = self.base.predict(noisy, objective.network_time(times), condition).float() - target
        loss = error.square().mean((1, 2, 3))
        if self.preset.min_snr_gamma:
            loss = loss * objective.min_snr_weight(times, self.preset.min_snr_gamma).to(error.device)
        return loss

    def validation_loss(self) -> float:
        pairs = [self._picture(("validation", i)) for i in range(VALIDATION_PICTURES)]
        latents = self.base.encode_pictures(to_pixels([picture for picture, _ in pairs]))
        keys = [("validation", i) for i in range(VALIDATION_PICTURES)]
        return float(self._loss(latents, [caption for _, caption in pairs], keys).mean())

    def draw_samples(self, step: int) -> Iterator[Event]:
        for column, prompt in enumerate(self.preset.sample_prompts):
            side = self.resolution
            request = Request([prompt], [column], steps=self.preset.sample_steps, width=side, height=side)
            for module in self.modules.values():
                module.eval()
            picture = self.base.generate(request)[0]
            for module in self.modules.values():
                module.train()
            yield save_picture(self.run, picture, step, column, prompt, column)
