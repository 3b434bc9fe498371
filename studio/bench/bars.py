"""The bars of each part of the benchmark: what a method may cost at most, beside whom.

"At memory speed" is: at most twice as long as the bytes that must move take to be copied. Copying a weight reads and
writes it. Merging writes a delta, reads both and writes the sum: four passes where a copy has two, so 4 copies at most.
Entries spread over a weight touch all of its cache lines: reading the originals, writing and restoring are five passes,
so 5 copies at most. Patches that are not written into weights move nothing: a tenth of a copy at most.
"""

from studio.bench.rows import Bar

ADDITIVE = "[!s]*"  # all but sara

MEMORY = [
    Bar("sd*", "lora", "peft-lora", 1.00, "peak of PEFT LoRA"),
    Bar("sd*", "orthogonal", "peft-lora", 1.00, "peak of PEFT LoRA"),
    Bar("sd15*", "sara", "lora", 1.05, "peak of LoRA at equal coverage"),
    Bar("sd15*checkpointing*", "sara", "full", 0.45, "peak of full fine-tuning, with checkpointing"),
    Bar("sd15*", "sara", "sara-reference", 0.70, "peak of the reference's way"),
    Bar("sd15*", "sara", "bytes_per_entry", 20.0, "bytes kept per trained entry, fp32 base"),
    Bar("sdxl*", "sara", "bytes_per_entry", 22.0, "bytes kept per trained entry, bf16 base"),
]

SPEED = [
    Bar("*", "lora", "peft-lora", 1.03, "step of PEFT LoRA"),
    Bar("*", "orthogonal", "peft-lora", 1.03, "step of PEFT LoRA"),
    Bar("linear*", "tlora", "lora", 1.10, "step of LoRA of equal rank"),
    Bar("conv*", "flora", "lora", 1.00, "step of conv-LoRA of equal rank"),
    Bar("sticker*", "sara", "sara-reference", 0.85, "step of the reference's way"),
]

MERGE = [
    Bar("*", ADDITIVE, "attach and detach", 0.1, "attach and detach, in copies"),
    Bar("*", "sara", "attach and detach", 5.0, "attach and detach, in copies"),
    Bar("*", "*", "merge", 4.0, "merge, in copies"),
]

FILES = [
    Bar("*", "studio", "peft", 0.5, "processor time of PEFT's merging"),
    Bar("*", "studio", "peak_mib", 2048, "MiB held"),
]
