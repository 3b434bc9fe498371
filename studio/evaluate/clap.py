"""CLAP as a metric of music, through transformers, from a local folder of weights (such as `laion/clap-htsat-unfused`).

`clap_text` is the mean cosine of sounds and captions, `clap_frechet` the Frechet distance of its features of sounds.
N sounds, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from studio.data.sounds import Sound
from studio.errors import MissingPart, reason_of
from studio.evaluate.frechet import frechet
from studio.evaluate.recital import Recital

BATCH = 4


class Clap:
    """A CLAP model and its processor. Raises MissingPart for a folder that holds none."""

    def __init__(self, folder: Path) -> None:
        from transformers import ClapModel, ClapProcessor

        if not folder.is_dir():
            raise MissingPart(
                f"there is no folder '{folder}'", "give the folder that holds config.json and the weights"
            )
        try:
            self.model: Any = ClapModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).eval()
            self.processor: Any = ClapProcessor.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
            reason = reason_of(error)
            raise MissingPart(f"'{folder}' cannot be loaded as CLAP: {reason}") from None

    @torch.no_grad()
    def hear(self, sounds: Sequence[Sound]) -> Tensor:
        """(N, F) of length 1."""
        rate = self.processor.feature_extractor.sampling_rate
        parts = []
        for start in range(0, len(sounds), BATCH):
            waves = [sound.at(rate, 1).wave[0].numpy() for sound in sounds[start : start + BATCH]]
            inputs = self.processor.feature_extractor(waves, sampling_rate=rate, return_tensors="pt")
            parts.append(_tensor(self.model.get_audio_features(**inputs)).float())
        return F.normalize(torch.cat(parts), dim=-1)

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """(N, F) of length 1."""
        inputs = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        asked = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return F.normalize(_tensor(self.model.get_text_features(**asked)).float(), dim=-1)


def _tensor(features: Any) -> Tensor:
    """transformers 5 wraps what version 4 returned as it is."""
    return features if isinstance(features, Tensor) else features.pooler_output


def clap_figures(folder: Path, recital: Recital) -> dict[str, float]:
    """The figures with the adapter, `_base` without it, `_references` of other true sounds. Raises MissingPart."""
    clap = Clap(folder)
    texts = clap.read([recording.caption for recording in recital.truth])
    truth = clap.hear([recording.sound for recording in recital.truth])
    figures = {}
    for suffix, sounds in (("", recital.worn.asked), ("_base", recital.alone.asked)):
        heard = clap.hear(sounds)
        figures[f"clap_text{suffix}"] = float((heard * texts).sum(-1).mean())
        figures[f"clap_frechet{suffix}"] = frechet(heard.double().numpy(), truth.double().numpy())
    floor = clap.hear([recording.sound for recording in recital.floor])
    figures["clap_text_references"] = float((truth * texts).sum(-1).mean())
    figures["clap_frechet_references"] = frechet(floor.double().numpy(), truth.double().numpy())
    return figures
