"""Learned words as files of textual inversion (Gal et al. 2022), one per word.

A base with one text encoder: one tensor (V, D) keyed by the word, which `load_textual_inversion(file)` reads. A base
with several: one tensor per encoder, `clip_l`, `clip_g`, `t5xxl`, as A1111, ComfyUI and diffusers' guide have it:

    state = safetensors.torch.load_file("cat.safetensors")
    pipe.load_textual_inversion(state["clip_g"], "cat", pipe.tokenizer_2, pipe.text_encoder_2)

V vectors, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from studio.errors import AdapterError, ExportRefused
from studio.exporting.job import Job
from studio.exporting.tensor_file import write_tensors
from studio.files import slugify
from studio.words import encoders_of, tokens_of

ENCODER_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}


@dataclass(frozen=True)
class WordFile:
    """A written word: `keys` maps each text encoder to the tensor's key in the file."""

    word: str
    path: Path
    keys: dict[str, str]
    vectors: dict[str, Tensor]


def check_words(job: Job) -> None:
    """Raises ExportRefused or AdapterError for words that the base cannot take or already knows."""
    tokenizers = encoders_of(job.base)
    for encoder, words in job.adapter.words.items():
        if encoder not in tokenizers:
            raise AdapterError(f"the adapter has words for '{encoder}', which '{job.base.name}' has not")
        for word, vectors in words.items():
            if vectors.ndim != 2:
                raise ExportRefused(
                    f"the word '{word}' has other vectors in each layer, which no program loads",
                    "train with learned_words=2 in place of learned_words_layerwise",
                )
            known = set(tokens_of(word, len(vectors))) & set(tokenizers[encoder].get_vocab())
            if known:
                raise ExportRefused(
                    f"the word '{min(known)}' is already a token of '{job.base.name}', so diffusers refuses it",
                    "train with another trigger word",
                )


def write_words(job: Job, folder: Path) -> list[WordFile]:
    """Writes one file per word into the folder. Refuses words as `check_words` does."""
    check_words(job)
    if job.adapter.words and not hasattr(job.base.pipe, "load_textual_inversion"):
        raise ExportRefused(
            f"a {type(job.base.pipe).__name__} loads no learned words in plain diffusers", "use --to checkpoint"
        )
    several = len(encoders_of(job.base)) > 1
    by_word: dict[str, dict[str, Tensor]] = {}
    for encoder, words in job.adapter.words.items():
        for word, vectors in words.items():
            by_word.setdefault(word, {})[encoder] = job.stored(vectors, f"{encoder}.{word}")
    files = []
    for word, by_encoder in by_word.items():
        path = _free(folder, slugify(word))
        keys = {encoder: ENCODER_KEYS[encoder] if several else word for encoder in by_encoder}
        tensors = {keys[encoder]: value for encoder, value in by_encoder.items()}
        write_tensors(path, tensors, {"format": "pt", "token": word})
        files.append(WordFile(word, path, keys, by_encoder))
    return files


def _free(folder: Path, name: str) -> Path:
    """`name.safetensors`, numbered if another word or the LoRA itself has that name."""
    path, number = folder / f"{name}.safetensors", 1
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.safetensors"
    return path
