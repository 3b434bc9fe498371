"""What `fit` trains for RDTF: a clip network on clips of any length, its tasks chosen by the curriculum.

B clips, F frames, Z latent channels, h and w latent height and width.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from studio.base import Request
from studio.bases.sticker_video import alpha
from studio.bases.sticker_video.batches import denoising_losses
from studio.bases.sticker_video.family import StickerVideo
from studio.bases.sticker_video.layers import attend_plainly
from studio.bases.sticker_video.sharing import save_clip_base
from studio.data import motions
from studio.data.clip_pool import ClipPool, EncodedClip, encoded, long_tailed_lengths
from studio.data.clip_shards import ShardStream, StreamedClip, StreamPool
from studio.data.clips import Clip, ClipSet, scan_clips
from studio.errors import PresetError, RequestError
from studio.files import write_atomically
from studio.fit import Group, Task
from studio.keyed import numpy_generator, torch_generator
from studio.paths import assets_dir
from studio.preset import Preset
from studio.run import Event, Run
from studio.samples import save_picture
from trainers.rdtf.curriculum import Curriculum
from trainers.rdtf.masks import Draw, draw_mask

if TYPE_CHECKING:
    from trainers.rdtf.method import Rdtf

VALIDATION_CLIPS = 24
CURRICULUM = "curriculum.json"


class ClipTask(Task):
    """Denoising of encoded clips under the dual mask."""

    reaches_all = False  # stills have no time, and a batch may be of text alone

    def __init__(self, method: Rdtf, base: StickerVideo, preset: Preset, run: Run) -> None:
        self.method, self.base, self.preset, self.run = method, base, preset, run
        self.side = preset.data.resolution or base.resolution
        if self.side % base.size_multiple:
            raise PresetError(f"data.resolution={self.side} is no multiple of {base.size_multiple}")
        self.curriculum = Curriculum(method.curriculum, max(1, round(method.curriculum_end * preset.steps)))
        self.modules = [base.pipe.unet, *([base.pipe.text_encoder] if method.text != "frozen" else [])]
        if base.device.type == "cpu" and preset.mixed_precision == "bf16":
            attend_plainly(base.pipe.unet)
        self.files: ClipSet | None = None
        self.stream: ShardStream | None = None
        self.pool = self._pool()
        self._make_trainable()

    def _make_trainable(self) -> None:
        for module in self.modules:
            module.train()
        for group in self.groups():
            for parameter in group.parameters.values():
                parameter.requires_grad_(True)

    def groups(self) -> list[Group]:
        unet = self.base.pipe.unet
        chosen = unet.temporal_names() if self.method.train == "temporal" else None
        named: dict[str, nn.Parameter] = {
            f"unet.{name}": value for name, value in unet.named_parameters() if chosen is None or name in chosen
        }
        if self.method.text != "frozen":
            text = self.base.pipe.text_encoder
            words = text.get_input_embeddings().weight
            named |= {
                f"text_encoder.{name}": value
                for name, value in text.named_parameters()
                if self.method.text == "all" or value is words
            }
        return [Group(named)]

    # -- data ----------------------------------------------------------------------------------------------------

    def _pool(self) -> ClipPool | StreamPool:
        data, seed = self.preset.data, self.preset.seed
        if data.source == "clips":
            if data.path is None:
                raise PresetError("there is nothing to train on", "give a folder of clips with --data")
            folder = Path(data.path.replace("{assets}", str(assets_dir()))).expanduser()
            caption = "" if "{" in data.caption else data.caption
            if any(folder.glob("*.tar")):
                self.stream = ShardStream(folder, data.frames, caption, seed)
                return StreamPool(self.stream, data.pool, data.refresh, seed, self._from_stream)
            self.files = scan_clips(folder, data.frames, caption)
            return ClipPool([len(clip.kept) for clip in self.files.clips], self._from_file, 0, seed)
        lengths = long_tailed_lengths(data.pool, data.frames, data.stills, seed)
        return ClipPool(
            lengths, lambda index, version: self._rendered((seed, index, version), lengths[index]), data.refresh, seed
        )

    def _from_stream(self, clip: StreamedClip) -> EncodedClip:
        return encoded(clip.load(partial(alpha.fitted, size=(self.side, self.side))), clip.caption, self._encode)

    def _from_file(self, index: int, version: int) -> EncodedClip:
        assert self.files is not None
        file = self.files.clips[index]
        return encoded(file.load(partial(alpha.fitted, size=(self.side, self.side))), file.caption, self._encode)

    def _rendered(self, key: tuple[object, ...], count: int, held_out: bool = False) -> EncodedClip:
        clip, caption, _ = motions.draw_clip(key, self.side, count, self.preset.data.glyphs, held_out)
        return encoded(clip, caption, self._encode)

    def _encode(self, clip: Clip) -> Tensor:
        return self.base.encode_clips(alpha.to_tensor(clip.frames))

    # -- losses --------------------------------------------------------------------------------------------------

    def losses(self, step: int, micro: int, slots: range) -> Tensor:
        clips = self.pool.draw(step, micro, slots, self.method.batches == "bucketed")
        keys = [(self.preset.seed, step, micro, slot) for slot in slots]
        draws = [self._draw(step, clip, key) for clip, key in zip(clips, keys)]
        loss, times = self._loss(clips, draws, keys)
        measured = _gathered(loss.detach().float().cpu(), times)
        everyone = self._everyone(step, micro, slots, len(measured))
        self.curriculum.observe(
            step,
            [draw for draw, _ in everyone],
            [energy for _, energy in everyone],
            measured[:, 1].tolist(),
            measured[:, 0].tolist(),
        )
        return loss

    def _draw(self, step: int, clip: EncodedClip, key: tuple[object, ...]) -> Draw:
        rng = numpy_generator("task", *key)
        if not self.method.dual_mask:
            return draw_mask("text", clip.count, rng)
        return self.curriculum.draw(step, clip.count, clip.energy, rng)

    def _everyone(self, step: int, micro: int, slots: range, total: int) -> list[tuple[Draw, float]]:
        """Draws and energies of all processes' slots, which every process can work out by itself."""
        all_slots = slots if total == len(slots) else range(total)
        clips = self.pool.draw(step, micro, all_slots, self.method.batches == "bucketed")
        return [
            (self._draw(step, clip, (self.preset.seed, step, micro, slot)), clip.energy)
            for clip, slot in zip(clips, all_slots)
        ]

    def _loss(
        self, clips: Sequence[EncodedClip], draws: Sequence[Draw], keys: Sequence[tuple], training: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The loss of each clip and its noise level in [0, 1]."""
        generators = [torch_generator("clip noise", *key) for key in keys]
        dropped = [self._dropped(g) if training else (False, False) for g in generators]
        given = [() if image else draw.given for draw, (_, image) in zip(draws, dropped)]
        captions = [
            "" if no_text or not draw.told else clip.caption for clip, draw, (no_text, _) in zip(clips, draws, dropped)
        ]
        objective, compat = self.base.objective, self.method.paper_compat
        shift = self.method.timestep_shift if training else 1.0
        loss, times = denoising_losses(self.base, clips, given, captions, generators, compat, shift)
        if self.preset.min_snr_gamma:
            loss = loss * objective.min_snr_weight(times, self.preset.min_snr_gamma).to(loss.device)
        return loss, times.float() / max(1.0, float(getattr(objective, "train_timesteps", 1000)))

    def _dropped(self, generator: torch.Generator) -> tuple[bool, bool]:
        """Whether caption and given frames are left out of a sample."""
        u = float(torch.rand((), generator=generator))
        both, text = self.method.both_dropout, self.preset.data.caption_dropout
        if u < both:
            return True, True
        return both <= u < both + text, both + text <= u < both + text + self.method.image_dropout

    def describe(self, step: int, micro: int, slots: range) -> str:
        clips = self.pool.draw(step, micro, slots, self.method.batches == "bucketed")
        return ", ".join(f"'{clip.caption}' ({clip.count} frames)" for clip in clips[:4])

    # -- what it shows -------------------------------------------------------------------------------------------

    def _held_out(self) -> list[EncodedClip]:
        """Clips of pairs that are never trained on; of a folder, its own first clips at fixed noise."""
        count = self.preset.data.frames
        if self.files is not None:
            return [self._from_file(i, 0) for i in range(min(VALIDATION_CLIPS, len(self.files.clips)))]
        if self.stream is not None:
            numbers = range(min(VALIDATION_CLIPS, self.stream.total))
            return [self._from_stream(self.stream.clip(number)) for number in numbers]
        return [self._rendered(("validation", i), count, held_out=True) for i in range(VALIDATION_CLIPS)]

    def validation_loss(self) -> float:
        """On held-out pairs of glyph and motion, each task in turn."""
        clips = self._held_out()
        tasks = ("text", "text-image", "interpolation", "prediction")
        draws = [
            draw_mask(tasks[i % len(tasks)], clip.count, numpy_generator("validation", i))
            for i, clip in enumerate(clips)
        ]
        losses = []
        for count in sorted({clip.count for clip in clips}):
            rows = [i for i, clip in enumerate(clips) if clip.count == count]
            keys = [("validation", i) for i in rows]
            losses.append(self._loss([clips[i] for i in rows], [draws[i] for i in rows], keys, training=False)[0])
        return float(torch.cat(losses).mean())

    def draw_samples(self, step: int) -> Iterator[Event]:
        """A contact sheet for each prompt, as PNG, and the clip itself beside it as WebP."""
        for module in self.modules:
            module.eval()
        count = self.preset.data.frames
        try:
            for column, prompt in enumerate(self.preset.sample_prompts):
                request = Request(
                    [prompt],
                    [column],
                    steps=self.preset.sample_steps,
                    width=self.side,
                    height=self.side,
                    frames=count,
                    fps=8.0,
                    loop=True,
                )
                clip = self.base.generate(request)[0]
                yield save_picture(self.run, clip.sheet(), step, column, prompt, column)
                _save_webp(clip, self.run.samples / f"{step:06d}-{column}.webp")
        finally:
            for module in self.modules:
                module.train()

    def save(self, folder: Path, step: int) -> Path:
        save_clip_base(self.base, folder / "base")
        write_atomically(folder / CURRICULUM, json.dumps(self.curriculum.state()))
        sections = self.run.folder / "sections"
        write_atomically(sections / "curriculum.html", curriculum_section(self.curriculum))
        write_atomically(sections / "data.html", self._data_section())
        return folder / "base"

    def restore(self, folder: Path) -> None:
        try:
            self.curriculum.restore(json.loads((folder / CURRICULUM).read_text()))
        except (OSError, ValueError, KeyError) as error:
            raise RequestError(f"the checkpoint '{folder}' is damaged ({CURRICULUM}): {error}", "remove it") from None

    def _data_section(self) -> str:
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self._data_lines())
        return f"<h2>Clips</h2><ul>{lines}</ul>"

    def _data_lines(self) -> list[str]:
        if isinstance(self.pool, StreamPool):
            return [*self.pool.stream.report(), f"{len(self.pool.used)} clips of the stream were drawn so far"]
        counts = ", ".join(f"{length}: {len(found)}" for length, found in sorted(self.pool.buckets.items()))
        lines = self.files.report() if self.files else [f"{len(self.pool.lengths)} clips by number of frames: {counts}"]
        return [*lines, f"{len(self.pool.used)} of {len(self.pool.lengths)} clips of the pool were drawn so far"]


def _gathered(losses: Tensor, times: Tensor) -> Tensor:
    """(slots of all processes, 2): losses and noise levels, in the order of the slots."""
    own = torch.stack([losses, times.float().cpu()], 1)
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return own
    device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
    parts = [torch.empty_like(own, device=device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, own.to(device))
    return torch.cat(parts).cpu()


def _save_webp(clip: Clip, path: Path) -> None:
    """The clip as an animated WebP, for looking at."""
    first, *rest = clip.frames
    first.save(path, "WEBP", save_all=True, append_images=rest, duration=list(clip.durations), loop=0, quality=90)


# -- the report --------------------------------------------------------------------------------------------------


def curriculum_section(curriculum: Curriculum) -> str:
    """What was drawn over time, as stacked shares, with competence as a line. HTML for the run's report."""
    history = [entry for entry in curriculum.history if entry["drawn"]]
    if not history:
        return ""
    tasks = sorted({task for entry in history for task in entry["drawn"]})
    width, height = 900, 200
    step = width / len(history)
    bars, colours = [], ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#76b7b2", "#b07aa1")
    for x, entry in enumerate(history):
        total, y = sum(entry["drawn"].values()), 0.0
        for number, task in enumerate(tasks):
            share = entry["drawn"].get(task, 0) / total * height
            colour = colours[number % len(colours)]
            bars.append(
                f"<rect x='{x * step:.1f}' y='{y:.1f}' width='{step:.2f}' height='{share:.1f}' fill='{colour}'/>"
            )
            y += share
    line = " ".join(f"{(x + 0.5) * step:.1f},{height * (1 - e['competence']):.1f}" for x, e in enumerate(history))
    names = ", ".join(
        f"<span style='color:{colours[i % len(colours)]}'>&#9632;</span> {html.escape(t)}" for i, t in enumerate(tasks)
    )
    return (
        f"<h2>Curriculum ({curriculum.mode})</h2><svg viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='shares of the tasks drawn, and competence, over steps'>{''.join(bars)}"
        f"<polyline fill='none' stroke='#000' stroke-width='2' points='{line}'/></svg>"
        f"<p>Shares of the tasks drawn: {names}. Line: competence, 0 below and 1 above.</p>"
    )
