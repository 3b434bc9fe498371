"""Clip bases made from image bases, and the paper's network at its true size.

The image base gives its autoencoder, its text encoder with the words of motion added, and the weights of its UNet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import torch

from studio.bases.stable_diffusion import StableDiffusion
from studio.bases.sticker_video.family import StickerVideo
from studio.bases.tiny import fixed_seed, word_tokenizer

Backbone = Literal["sticker_unet", "paper_unet", "stock_unet3d"]


def video_around(
    image: StableDiffusion,
    name: str,
    seed: int = 0,
    *,
    alpha: bool = True,
    words: Sequence[str] = (),
    backbone: Backbone = "sticker_unet",
    condition_fill: str = "blend",
    condition_spread: float = 0.0,
    noise_share: float = 0.0,
    keep_weights: bool = True,
    side: int | None = None,
    **options: Any,
) -> StickerVideo:
    """A clip base around an image base, which it takes over: the same VAE, text encoder and spatial weights.

    `words` are added to the vocabulary. `keep_weights=False` leaves the UNet random, as those of other backbones always
    are; `side` is the pixels of a frame, by default as the image base's; `options` are those of StickerUNet. The
    temporal layers add nothing yet, so each frame is drawn as the image base draws it.
    """
    from studio.bases.sticker_video.network import StickerUNet
    from studio.bases.sticker_video.pipeline import StickerVideoPipeline

    old = image.pipe.unet
    latent = image.pipe.vae.config.latent_channels * (2 if alpha else 1)
    size = side // image.latent_factor if side else old.config.sample_size
    with fixed_seed(seed):
        if backbone == "stock_unet3d":
            unet = stock_unet({**old.config, "sample_size": size}, 2 * latent + 1, latent)
        elif backbone == "paper_unet":
            unet = paper_unet(latent, size, **options)
        else:
            unet = StickerUNet.around(old, 2 * latent + 1, latent, size, **options)
            if not keep_weights:
                unet.take_image(_random_like(old).state_dict())
        tokenizer, text_encoder = with_words(image.pipe.tokenizer, image.pipe.text_encoder, words)
    pipe = StickerVideoPipeline(
        vae=image.pipe.vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=image.pipe.scheduler,
        condition_fill=condition_fill,
        condition_spread=condition_spread,
        noise_share=noise_share,
    )
    return StickerVideo.at_rest(name, pipe, image.licence)


def _random_like(unet: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel.from_config(unet.config)


def stock_unet(config: Any, in_channels: int, out_channels: int) -> Any:
    """diffusers' own `UNet3DConditionModel` of the same widths. It has no masks, so its clips share one length."""
    from diffusers import UNet3DConditionModel

    downs = tuple(kind.replace("2D", "3D") for kind in config["down_block_types"])
    ups = tuple(kind.replace("2D", "3D") for kind in config["up_block_types"])
    return UNet3DConditionModel(
        sample_size=config["sample_size"],
        in_channels=in_channels,
        out_channels=out_channels,
        down_block_types=downs,
        up_block_types=ups,
        block_out_channels=tuple(config["block_out_channels"]),
        layers_per_block=config["layers_per_block"],
        norm_num_groups=config["norm_num_groups"],
        cross_attention_dim=config["cross_attention_dim"],
        attention_head_dim=max(8, config["block_out_channels"][0] // 8),
    )


def with_words(tokenizer: Any, text_encoder: Any, words: Sequence[str]) -> tuple[Any, Any]:
    """The tokenizer and text encoder with more whole words; every token that was there keeps its vector.

    Nothing changes for a tokenizer that is not made of words, such as CLIP's own, or that has them all.
    """
    vocabulary = tokenizer.get_vocab()
    new = [word for word in words if f"{word}</w>" not in vocabulary]
    if not new or len(vocabulary) > 20_000:
        return tokenizer, text_encoder
    known = [token.removesuffix("</w>") for token in vocabulary if token.endswith("</w>") and token.isascii()]
    larger = word_tokenizer([*(word for word in known if len(word) > 1), *new], tokenizer.model_max_length)
    found = larger.get_vocab()
    old = text_encoder.get_input_embeddings().weight.detach()
    vectors = torch.randn(len(larger), old.shape[1]) * old.std()
    shared = [token for token in found if token in vocabulary]
    vectors[[found[token] for token in shared]] = old[[vocabulary[token] for token in shared]]
    from transformers import CLIPTextConfig, CLIPTextModel

    config = json.loads(text_encoder.config.to_json_string()) | {
        "vocab_size": len(larger),
        "bos_token_id": larger.bos_token_id,
        "eos_token_id": larger.eos_token_id,
        "pad_token_id": larger.pad_token_id,
    }
    wider = CLIPTextModel(CLIPTextConfig(**config))
    state = text_encoder.state_dict()
    name = next(key for key in state if key.endswith("token_embedding.weight"))
    wider.load_state_dict({**state, name: vectors})
    return larger, wider


# -- the paper's size --------------------------------------------------------------------------------------------

#: RDTF's table 6 and its published class: 8 frames at 256 px, text 1024 wide, heads of 64, 0.96 billion parameters.
PAPER_IMAGE: dict[str, Any] = {
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1024, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 16, 20),
}


def paper_unet(latent_channels: int = 4, sample_size: int = 32, **options: Any) -> Any:
    """The paper's network, with our masks. Build it inside `torch.device("meta")` to look at it for free."""
    from studio.bases.sticker_video.network import StickerUNet

    channels = {"in_channels": 2 * latent_channels + 1, "out_channels": latent_channels, "sample_size": sample_size}
    return StickerUNet(PAPER_IMAGE | channels, depthwise=True, temporal_in=True, **options)
