"""The names under which the original programs store a pipeline's weights, written from their side.

diffusers converts such names when it opens a checkpoint that is one file; this is the inverse, so that tests can make
such files from models of any size. Only names and layouts change: tensors may be on the meta device.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTER = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


MMDIT = {  # outside of the blocks
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "context_embedder": "context_embedder",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
}
MMDIT_BLOCK = {
    "norm1.linear": "x_block.adaLN_modulation.1",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
    "attn.to_q": "x_block.attn.qkv",
    "attn.norm_q": "x_block.attn.ln_q",
    "attn.norm_k": "x_block.attn.ln_k",
    "attn.to_out.0": "x_block.attn.proj",
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.norm_added_q": "context_block.attn.ln_q",
    "attn.norm_added_k": "context_block.attn.ln_k",
    "attn.to_add_out": "context_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
}


def original_tensors(pipe) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 1, 2, XL or 3 pipeline."""
    if hasattr(pipe, "transformer"):
        return sd3_tensors(pipe)
    found = {f"model.diffusion_model.{name}": value for name, value in unet_tensors(pipe.unet).items()}
    found |= {f"first_stage_model.{name}": value for name, value in vae_tensors(pipe.vae).items()}
    if hasattr(pipe, "text_encoder_2"):
        found |= clip_tensors(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        found |= open_clip_tensors(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    elif pipe.unet.config.use_linear_projection:
        found |= open_clip_tensors(pipe.text_encoder, "cond_stage_model.model.")
    else:
        found |= clip_tensors(pipe.text_encoder, "cond_stage_model.transformer.")
    return found


def unet_tensors(unet) -> dict[str, Tensor]:
    prefixes = OUTER | _block_prefixes(unet.config)
    renamed = {}
    for name, value in unet.state_dict().items():
        old = max((prefix for prefix in prefixes if name.startswith(f"{prefix}.")), key=len)
        rest = name.removeprefix(f"{old}.")
        head, dot, tail = rest.partition(".")
        if ".resnets." in f".{old}.":
            rest = RESNET[head] + dot + tail
        renamed[f"{prefixes[old]}.{rest}"] = value
    assert len(renamed) == len(unet.state_dict())
    return renamed


def sd3_tensors(pipe) -> dict[str, Tensor]:
    """All weights of a Stable Diffusion 3 pipeline, T5's too if it has one."""
    found = {f"model.diffusion_model.{name}": value for name, value in mmdit_tensors(pipe.transformer).items()}
    found |= {f"first_stage_model.{name}": value for name, value in vae_tensors(pipe.vae).items()}
    for encoder, name in ((pipe.text_encoder, "clip_l"), (pipe.text_encoder_2, "clip_g")):
        found |= clip_tensors(encoder, f"text_encoders.{name}.transformer.")
    # Its makers' program has no projection after the first CLIP, where diffusers has one that does nothing.
    projection = found.pop("text_encoders.clip_l.transformer.text_projection.weight")
    assert projection.is_meta or torch.equal(projection, torch.eye(len(projection)))
    t5 = getattr(pipe, "text_encoder_3", None)
    stored = {} if t5 is None else t5.state_dict()
    return found | {f"text_encoders.t5xxl.transformer.{name}": value for name, value in stored.items()}


def mmdit_tensors(transformer) -> dict[str, Tensor]:
    """The transformer's: query, key and value in one, and shift before scale in the last modulations."""
    state, renamed = transformer.state_dict(), {}
    last = f"transformer_blocks.{transformer.config.num_layers - 1}."
    for name, value in state.items():
        if name.startswith(("norm_out.", f"{last}norm1_context.")):
            scale, shift = value.chunk(2)
            value = torch.cat([shift, scale])
        if any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        for query, others in ((".to_q.", (".to_k.", ".to_v.")), (".add_q_proj.", (".add_k_proj.", ".add_v_proj."))):
            if query in name:
                value = torch.cat([value, *(state[name.replace(query, other)] for other in others)])
        renamed[_mmdit_name(name)] = value
    assert sum(value.numel() for value in renamed.values()) == sum(value.numel() for value in state.values())
    return renamed


def _mmdit_name(name: str) -> str:
    if name in MMDIT:
        return MMDIT[name]
    module, _, kind = name.rpartition(".")
    if module in MMDIT:
        return f"{MMDIT[module]}.{kind}"
    _, number, rest = module.split(".", 2)
    return f"joint_blocks.{number}.{MMDIT_BLOCK[rest]}.{kind}"


def _block_prefixes(config) -> dict[str, str]:
    prefixes, number, depth = {}, 1, config.layers_per_block
    last = len(config.block_out_channels) - 1
    for i in range(last + 1):
        for j in range(depth):
            prefixes[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{number}.0"
            prefixes[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{number}.1"
            number += 1
        if i < last:
            prefixes[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    for i, kind in enumerate(config.up_block_types):
        for j in range(depth + 1):
            number = i * (depth + 1) + j
            prefixes[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{number}.0"
            prefixes[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{number}.1"
        place = 2 if "Attn" in kind else 1
        prefixes[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{number}.{place}.conv"
    return prefixes


def vae_tensors(vae) -> dict[str, Tensor]:
    last = len(vae.config.block_out_channels) - 1
    words = {
        "mid_block.resnets.0": "mid.block_1",
        "mid_block.resnets.1": "mid.block_2",
        "mid_block.attentions.0": "mid.attn_1",
        "group_norm": "norm",
        "to_q": "q",
        "to_k": "k",
        "to_v": "v",
        "to_out.0": "proj_out",
        "conv_norm_out": "norm_out",
        "conv_shortcut": "nin_shortcut",
        "downsamplers.0": "downsample",
        "upsamplers.0": "upsample",
        ".resnets.": ".block.",
    }
    renamed = {}
    for name, value in vae.state_dict().items():
        new = name
        for i in range(last + 1):
            new = new.replace(f"down_blocks.{i}.", f"down.{i}.").replace(f"up_blocks.{i}.", f"up.{last - i}.")
        for old, word in words.items():
            new = new.replace(old, word)
        is_attention = ".attn_1." in new and value.ndim == 2
        renamed[new] = value[:, :, None, None] if is_attention else value
    assert len(renamed) == len(vae.state_dict())
    return renamed


def clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    state = encoder.state_dict()
    names = {name: name if name.startswith("text_projection") else f"text_model.{_plain(name)}" for name in state}
    return {f"{prefix}{names[name]}": value for name, value in state.items()}


def open_clip_tensors(encoder, prefix: str) -> dict[str, Tensor]:
    words = {
        "encoder.layers.": "transformer.resblocks.",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
        "self_attn.out_proj": "attn.out_proj",
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    state = {_plain(name): value for name, value in encoder.state_dict().items()}
    renamed = {}
    for name, value in state.items():
        if name == "text_projection.weight":
            renamed["text_projection"] = value.T
        elif ".q_proj." in name:
            layer, kind = name.split(".self_attn.")[0], name.rsplit(".", 1)[-1]
            joint = torch.cat([state[f"{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"])
            renamed[f"{layer.replace('encoder.layers.', 'transformer.resblocks.')}.attn.in_proj_{kind}"] = joint
        elif ".k_proj." not in name and ".v_proj." not in name:
            for old, word in words.items():
                name = name.replace(old, word)
            renamed[name] = value
    return {f"{prefix}{name}": value for name, value in renamed.items()}


def _plain(name: str) -> str:
    """The encoder with a projection wraps its model once more."""
    return name.removeprefix("text_model.")
