"""MusicGen: a transformer that writes the codes of a neural audio codec, told what by T5 (Copet et al. 2023).

transformers' MusicgenForConditionalGeneration: text encoder, codec (EnCodec) and decoder in one network. Every delay,
pad and mask of training is that of generation; transformers' own `labels` leave the delay pattern to the caller.
B batch, K codebooks (2 x 4 for stereo, left and right in turn), F frames, L tokens of text, D its width, T samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from studio.attachment import Site, find_sites
from studio.base import Base, Condition, Request
from studio.data.sounds import Sound
from studio.errors import BaseError, RequestError
from studio.music.delay import delayed, token_losses
from studio.patch import LayerShape

LAYERS = "musicgen.decoder.model.decoder.layers"
IDLE = ("musicgen.audio_encoder.", "musicgen.text_encoder.shared")  # the latter is a second name of embed_tokens
LONGEST_TEXT = 512  # tokens; T5 was trained on no more
GUIDANCE = 3.0  # the authors' own, as is TOP_K; what a base says of itself counts more
TOP_K = 250


@dataclass
class Parts:
    """The network, and the processor that goes with it: a tokenizer and the codec's feature extractor."""

    musicgen: Any
    processor: Any

    @property
    def components(self) -> dict[str, Any]:
        return {"musicgen": self.musicgen, "processor": self.processor}

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    def to(self, device: torch.device | str) -> Parts:
        self.musicgen.to(device)
        return self

    def save_pretrained(self, folder: Path | str) -> None:
        """A folder that transformers opens with `from_pretrained`."""
        self.musicgen.save_pretrained(folder)
        self.processor.save_pretrained(folder)


class MusicGen(Base):
    family = "musicgen"
    medium = "audio"
    pipeline_class = "MusicgenForConditionalGeneration"
    denoiser_name = "musicgen"
    text_encoder_names = ()
    groups: ClassVar = {
        "attention": (f"{LAYERS}.*.self_attn.*_proj", f"{LAYERS}.*.encoder_attn.*_proj"),
        "cross-attention": (f"{LAYERS}.*.encoder_attn.*_proj",),
        "linear": ("musicgen.decoder.*:linear", "musicgen.enc_to_dec_proj:linear"),
        "text-encoder": ("musicgen.text_encoder.*:linear",),
        "all": ("musicgen.decoder.*:linear", "musicgen.decoder.*:embedding", "musicgen.enc_to_dec_proj:linear"),
        # -- places for inserted modules, in the order of the forward pass
        "text_states": ("musicgen.enc_to_dec_proj:linear",),
        "after_self_attn": (f"{LAYERS}.*.self_attn:block",),
        "after_cross_attn": (f"{LAYERS}.*.encoder_attn:block",),
        "after_ffn": (f"{LAYERS}.*.fc2:linear",),
        "after_layer": (f"{LAYERS}.?:block", f"{LAYERS}.??:block"),
        "after_final_norm": ("musicgen.decoder.model.decoder.layer_norm:norm",),
    }

    # -- loading -----------------------------------------------------------------------------------------------

    @classmethod
    def from_folder(
        cls, folder: Path, name: str, dtype: torch.dtype, licence: str = "", variant: str | None = None
    ) -> Self:
        from transformers import AutoTokenizer, MusicgenForConditionalGeneration

        loaded: Any = MusicgenForConditionalGeneration.from_pretrained(
            folder,
            dtype=torch.float32,  # the codec must not be rounded on its way in
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            output_loading_info=True,
        )
        network, report = loaded
        if absent := sorted(report["missing_keys"]):
            raise BaseError(
                f"'{folder}' is not complete: its files lack {len(absent)} tensors, first '{absent[0]}'",
                "copy or download it again",
            )
        for part, module in network.named_children():
            if part != "audio_encoder":
                module.to(dtype)
        return cls.at_rest(name, network, AutoTokenizer.from_pretrained(folder, local_files_only=True), licence)

    @classmethod
    def at_rest(cls, name: str, network: Any, tokenizer: Any, licence: str) -> Self:
        """A base around the network, none of which trains."""
        from transformers import EncodecFeatureExtractor, MusicgenProcessor

        codec = network.config.audio_encoder
        extractor = EncodecFeatureExtractor(feature_size=codec.audio_channels, sampling_rate=codec.sampling_rate)
        network.config.decoder.decoder_start_token_id = network.config.decoder.pad_token_id  # `labels=` needs it
        network.eval().requires_grad_(False)
        return cls(name, Parts(network, MusicgenProcessor(extractor, tokenizer)), licence)

    # -- facts -------------------------------------------------------------------------------------------------

    @property
    def sample_rate_hz(self) -> int:
        return int(self.denoiser.config.audio_encoder.sampling_rate)

    @property
    def frame_rate_hz(self) -> float:
        """Frames of codes per second."""
        return self.sample_rate_hz / math.prod(self.denoiser.config.audio_encoder.upsampling_ratios)

    @property
    def codebooks(self) -> int:
        return int(self.denoiser.config.decoder.num_codebooks)

    @property
    def channels(self) -> int:
        return int(self.denoiser.config.decoder.audio_channels)

    @property
    def longest_seconds(self) -> float:
        """As far as the decoder's positions were trained."""
        return (self.denoiser.config.decoder.max_position_embeddings - self.codebooks) / self.frame_rate_hz

    @property
    def seconds(self) -> float:
        """The length of what is played where none is asked for."""
        return min(8.0, self.longest_seconds)

    def frames_in(self, seconds: float) -> int:
        return max(1, round(seconds * self.frame_rate_hz))

    def sites(self) -> dict[str, Site]:
        """The layers of decoder and text encoder, and the decoder's blocks. The codec is left alone."""
        found = find_sites({"musicgen": self.denoiser})
        kept = {name: site for name, site in found.items() if not name.startswith(IDLE)}
        width = LayerShape("block", (self.denoiser.config.decoder.hidden_size,))
        layers = self.denoiser.decoder.model.decoder.layers
        for number, layer in enumerate(layers):
            name = f"{LAYERS}.{number}"
            kept[name] = Site(name, layer, width)
            for attention in ("self_attn", "encoder_attn"):
                kept[f"{name}.{attention}"] = Site(f"{name}.{attention}", getattr(layer, attention), width)
            kept[f"{name}.fc2"] = replace(kept[f"{name}.fc2"], carrier=layer)
        # The decoder makes the generation cache within its first call, so it is the last layer that is told of it.
        for name, carrier in (
            ("musicgen.decoder.model.decoder.layer_norm", layers[-1]),
            ("musicgen.enc_to_dec_proj", self.denoiser),
        ):
            if name in kept:
                kept[name] = replace(kept[name], carrier=carrier)
        return kept

    def choose_attention(self) -> str:
        return "attention: sdpa (transformers' MusicGen has no way to xformers)"

    def enable_gradient_checkpointing(self) -> None:
        """transformers checkpoints layers that are in training mode only, so they are, with nothing to drop out."""
        decoder = self.denoiser.decoder.model.decoder
        decoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for layer in decoder.layers:
            layer.dropout = layer.activation_dropout = 0.0
            layer.training = True

    # -- sounds and text ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode_sounds(self, waves: Tensor) -> Tensor:
        """Codes (B, K, F) of waves (B, C, T) in [-1, 1] at the base's rate; C is 1, or 2 for a stereo base."""
        codec = self.denoiser.audio_encoder
        waves = waves.to(self.device, torch.float32)
        sides = [waves[:, :1], waves[:, -1:]] if self.channels == 2 else [waves]
        codes = [codec.encode(side).audio_codes[0] for side in sides]
        return torch.stack(codes, 2).flatten(1, 2)

    @torch.no_grad()
    def decode_sounds(self, codes: Tensor) -> Tensor:
        """Waves (B, C, T) of codes (B, K, F)."""
        codec = self.denoiser.audio_encoder
        sides = [codes[:, side :: self.channels] for side in range(self.channels)]
        return torch.cat([codec.decode(side[None], [None]).audio_values for side in sides], 1)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """`text` (B, L, D) and `mask` (B, L). An empty prompt is the null condition: its mask is zero throughout."""
        told = self.pipe.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=LONGEST_TEXT, return_tensors="pt"
        ).to(self.device)
        text = self.denoiser.text_encoder(input_ids=told.input_ids, attention_mask=told.attention_mask)[0]
        meant = torch.tensor([bool(prompt) for prompt in prompts], device=self.device)
        return {"text": text, "mask": told.attention_mask * meant[:, None]}

    def losses(self, codes: Tensor, condition: Condition, weights: Tensor | None = None) -> Tensor:
        """Cross-entropy of each sample, (B,), in nats per code, which count as `weights` (B, K, F) say."""
        from transformers.modeling_outputs import BaseModelOutput

        inputs, labels = delayed(codes.to(self.device), self.denoiser.config.decoder.pad_token_id)
        text = BaseModelOutput(last_hidden_state=condition["text"].to(self.device, self.denoiser.dtype))
        logits = self.denoiser(
            encoder_outputs=text,
            attention_mask=condition["mask"].to(self.device),
            decoder_input_ids=inputs.flatten(0, 1),
            use_cache=False,
        ).logits
        return token_losses(logits.view(*labels.shape, -1), labels, weights)

    # -- playing -----------------------------------------------------------------------------------------------

    def generate(self, request: Request) -> list[Any]:
        """Sounds, each drawn under its own seed alone. Raises RequestError for what MusicGen has not."""
        self._refuse(request)
        with self._caching():
            each = zip(request.prompts, request.seeds, strict=True)
            return [self._play([prompt], seed, request)[0] for prompt, seed in each]

    def generate_together(self, request: Request) -> list[Any]:
        """The same several times faster, all prompts at once under the first seed: each depends on the others too."""
        self._refuse(request)
        with self._caching():
            return self._play(list(request.prompts), request.seeds[0], request)

    def _refuse(self, request: Request) -> None:
        if request.negative:
            raise RequestError(f"'{self.name}' takes no negative prompt", "say in the prompt what is wanted")
        if request.steps is not None or request.width or request.height:
            raise RequestError(
                f"'{self.name}' writes music frame by frame: it has no sampling steps and no picture size",
                "set the length with --seconds",
            )
        seconds = self.seconds if request.seconds is None else request.seconds
        if not 0 < seconds <= self.longest_seconds:
            raise RequestError(
                f"'{self.name}' cannot play {seconds:g} seconds", f"it plays up to {self.longest_seconds:.0f} at once"
            )

    @torch.no_grad()
    def _play(self, prompts: list[str], seed: int, request: Request) -> list[Sound]:
        from transformers import StoppingCriteriaList

        seconds = self.seconds if request.seconds is None else request.seconds
        new_tokens = self.frames_in(seconds) + self.codebooks - 1
        guidance = self.denoiser.generation_config.guidance_scale or GUIDANCE
        options: dict[str, Any] = {
            "do_sample": True,
            "top_k": self.denoiser.generation_config.top_k or TOP_K,
            "guidance_scale": guidance if request.guidance is None else request.guidance,
            "max_new_tokens": new_tokens,
        }
        if any(prompts):
            told = self.pipe.tokenizer(
                prompts, padding=True, truncation=True, max_length=LONGEST_TEXT, return_tensors="pt"
            )
            options |= told.to(self.device)
        else:
            options |= self.denoiser.get_unconditional_inputs(len(prompts))
        if request.on_step is not None:
            options["stopping_criteria"] = StoppingCriteriaList([_Counter(request.on_step, new_tokens)])
        with _seeded(seed, self.device):
            waves = self.denoiser.generate(**options)
        samples = round(seconds * self.sample_rate_hz)
        return [Sound(wave.float().cpu()[:, :samples], self.sample_rate_hz) for wave in waves]

    @contextmanager
    def _caching(self) -> Iterator[None]:
        """Inside, layers keep their cache: under gradient checkpointing transformers takes it from them."""
        training = [layer for layer in self.denoiser.decoder.model.decoder.layers if layer.training]
        for layer in training:
            layer.training = False
        try:
            yield
        finally:
            for layer in training:
                layer.training = True

    # -- for tests ---------------------------------------------------------------------------------------------

    @classmethod
    def tiny(cls, seed: int = 0) -> MusicGen:
        from transformers import (
            EncodecConfig,
            GenerationConfig,
            MusicgenConfig,
            MusicgenDecoderConfig,
            MusicgenForConditionalGeneration,
        )

        from studio.bases.tiny import fixed_seed, tiny_t5

        with fixed_seed(seed):
            text_encoder, tokenizer = tiny_t5(width=24)
            codec = EncodecConfig(
                target_bandwidths=[1.0],
                sampling_rate=1600,
                num_filters=4,
                upsampling_ratios=[4, 4, 2],
                hidden_size=16,
                codebook_size=32,
                num_lstm_layers=1,
                kernel_size=3,
                last_kernel_size=3,
            )
            decoder = MusicgenDecoderConfig(
                vocab_size=32,
                max_position_embeddings=512,
                num_hidden_layers=3,
                ffn_dim=48,
                num_attention_heads=4,
                hidden_size=32,
                num_codebooks=4,
                pad_token_id=32,
                bos_token_id=32,
            )
            config = MusicgenConfig(text_encoder=text_encoder.config, audio_encoder=codec, decoder=decoder)
            network: Any = MusicgenForConditionalGeneration(config)
            _spread_codes(network.audio_encoder)
            for head in network.decoder.lm_heads:  # else nearly uniform, whatever is said
                head.weight.data.mul_(20)
        network.generation_config = GenerationConfig(bos_token_id=32, pad_token_id=32, decoder_start_token_id=32)
        return cls.at_rest("tiny-musicgen", network, tokenizer, "Apache-2.0")


class _Counter:
    """A stopping criterion that never stops and counts: MusicGen's own `generate` tells a streamer nothing."""

    def __init__(self, on_step: Any, total: int) -> None:
        self.on_step, self.total, self.done = on_step, total, 0

    def __call__(self, tokens: Tensor, scores: Any, **_: Any) -> Tensor:
        self.done += 1
        self.on_step(self.done, self.total)
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)


@torch.no_grad()
def _spread_codes(codec: Any) -> None:
    """Gives a random codec codebooks that its frames use: fresh ones are zeros, which would all be one code."""
    size = codec.config.codebook_size
    heard = codec.encoder(torch.randn(1, 1, size * math.prod(codec.config.upsampling_ratios)))[0].T  # (frames, width)
    for number, layer in enumerate(codec.quantizer.layers):
        layer.codebook.embed.copy_(torch.randn(size, heard.shape[1]) * heard.std(0) + (0 if number else heard.mean(0)))


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global streams inside, which is where transformers samples, and leaves them as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
