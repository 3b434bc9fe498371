"""What a stranger does with our exports: diffusers alone, in a process of its own.

    plain_diffusers_pictures.py BASE LORA WORD CHECKPOINT PROMPT SEED STEPS OUT

Writes arrays (H, W, 3) in [0, 1]: OUT/lora.npy, OUT/base.npy and OUT/checkpoint.npy.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

base, lora, word, checkpoint, prompt, seed, steps, out = sys.argv[1:]


def draw(pipe, name):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(int(seed))
    picture = pipe(prompt, generator=generator, num_inference_steps=int(steps), output_type="np").images[0]
    np.save(Path(out, f"{name}.npy"), picture)


torch.set_num_threads(1)
pipe = StableDiffusionPipeline.from_pretrained(base)
pipe.load_textual_inversion(word)
pipe.load_lora_weights(lora)
draw(pipe, "lora")
pipe.unload_lora_weights()
draw(pipe, "base")
draw(DiffusionPipeline.from_pretrained(checkpoint), "checkpoint")
assert not [name for name in sys.modules if name.split(".")[0] in ("studio", "trainers")]
