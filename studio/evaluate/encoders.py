"""CLIP and DINO as metrics, through transformers, from a local folder of weights. Nothing is downloaded.

CLIP-I and CLIP-T are mean cosines of image-image and image-text features; DINO's feature is the class token of the last
layer, as in PEFT's comparison. The folders are those of the hub: `openai/clip-vit-large-patch14`,
`facebook/dinov2-base`, `facebook/dino-vits16` or others of their kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from studio.errors import MissingPart, reason_of
from studio.evaluate.exhibit import Exhibit
from studio.evaluate.metrics import FeatureMetric

BATCH = 16


class ClipMetric:
    """CLIP-I as `clip_similarity`, CLIP-T as `clip_text`: how well a picture fits its prompt, the new word left out."""

    name = "clip"

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer, CLIPModel

        self.model = _loaded(CLIPModel, folder)
        self.processor = _processor(folder)
        self.tokenizer = _guarded(lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True), folder)
        self.features = FeatureMetric("clip", self.look)

    @torch.no_grad()
    def look(self, pictures: Sequence[Image.Image]) -> Tensor:
        return _by_batches(pictures, self.processor, lambda x: _tensor(self.model.get_image_features(pixel_values=x)))

    @torch.no_grad()
    def read(self, texts: Sequence[str]) -> Tensor:
        """Features of texts, (B, F) of length 1."""
        limit = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        asked = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return F.normalize(_tensor(self.model.get_text_features(**asked)).float(), dim=-1)

    def measure(self, exhibit: Exhibit) -> dict[str, float]:
        figures = self.features.measure(exhibit)
        prompts = self.read(exhibit.texts)
        for suffix, drawn in (("", exhibit.worn), ("_base", exhibit.alone)):
            figures[f"clip_text{suffix}"] = float((self.look(drawn.settings) * prompts).sum(-1).mean())
        return figures


def dino_metric(folder: Path) -> FeatureMetric:
    """DINO or DINOv2. Raises MissingPart."""
    from transformers import AutoModel

    model, processor = _loaded(AutoModel, folder), _processor(folder)

    @torch.no_grad()
    def look(pictures: Sequence[Image.Image]) -> Tensor:
        return _by_batches(pictures, processor, lambda x: model(pixel_values=x).last_hidden_state[:, 0])

    return FeatureMetric("dino", look)


def _by_batches(pictures: Sequence[Image.Image], processor: Any, embed: Any) -> Tensor:
    parts = []
    for start in range(0, len(pictures), BATCH):
        batch = [picture.convert("RGB") for picture in pictures[start : start + BATCH]]
        parts.append(embed(processor(images=batch, return_tensors="pt")["pixel_values"]).float())
    return F.normalize(torch.cat(parts), dim=-1)


def _tensor(features: Any) -> Tensor:
    """transformers 5 wraps what version 4 returned as it is."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _loaded(kind: Any, folder: Path) -> Any:
    model = _guarded(lambda: kind.from_pretrained(folder, local_files_only=True, use_safetensors=True), folder)
    return model.eval().requires_grad_(False)


def _processor(folder: Path) -> Any:
    from transformers import AutoImageProcessor

    return _guarded(lambda: AutoImageProcessor.from_pretrained(folder, local_files_only=True), folder)


def _guarded(load: Any, folder: Path) -> Any:
    if not folder.is_dir():
        raise MissingPart(f"there is no folder '{folder}'", "give the folder that holds config.json and the weights")
    try:
        return load()
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        reason = reason_of(error)
        raise MissingPart(
            f"'{folder}' cannot be loaded: {reason}", "it should hold config, preprocessor and safetensors weights"
        ) from None
