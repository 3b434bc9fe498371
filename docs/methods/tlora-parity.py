"""Our TLoRA layer beside the authors', with cores copied: the greatest relative differences.

    python docs/methods/tlora-parity.py PATH/attention_processor.py

PATH is the file of the authors' released code that defines TTMLoRALinearLayer (marcocst/PEFTDiff,
subject-driven-generation/utils/attention_processor.py); it needs nothing but torch.
"""

import importlib.util
import sys

import torch

from studio.attachment import Site, attach
from studio.method import Origin, method_from
from studio.patch import LayerShape
from studio.tensor_ring import identity_place, sides_of


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(((one - other).abs().max() / other.abs().max()).detach())


def compare(theirs: type, dtype: torch.dtype, widths: tuple[int, int], rank: int, part: str, init: str) -> list[float]:
    """Differences of the output, of the gradient of the input, and of the transform's cores."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(*widths).to(dtype).requires_grad_(False)
    x = torch.randn(2, 77, widths[0], dtype=dtype, requires_grad=True)
    residual = {"lora": "lora", "ttv": "ring"}[part]
    method = method_from({"kind": "tlora", "transform_rank": rank, "residual": residual, "rank": 4, "init": init})
    patch = method.patch("site", LayerShape.of(layer), Origin("parity")).to(dtype)
    for parameter in patch.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    other = theirs(*widths, *map(list, map(sides_of, widths)), 4, rank, addition_part=part).to(dtype)
    place = identity_place(rank, init == "reference").to(dtype)
    with torch.no_grad():
        for copied, core in zip(other.transform_core, patch.cores("E"), strict=True):
            full = core + torch.eye(len(core), dtype=dtype)[:, :, None, None] * place
            copied.copy_(full[:, :, 0, 0] if rank == 1 else full)
        if part == "lora":
            other.lora_A.copy_(patch.down)
            other.lora_B.copy_(patch.up)
        else:
            for copied, core in zip(other.ttv_core, [*patch.cores("B"), *patch.cores("C")], strict=True):
                copied.copy_(core)
    wanted = other(layer, x)
    flow = torch.randn_like(wanted)
    wanted.backward(flow)
    their_x, x.grad = x.grad, None
    with attach({"u.site": Site("u.site", layer, LayerShape.of(layer))}, {"u.site": [patch]}):
        found = layer(x)
    found.backward(flow)
    cores = zip(patch.cores("E"), other.transform_core, strict=True)
    of_cores = max(relative(e.grad.flatten(), core.grad.flatten()) for e, core in cores)
    return [relative(found, wanted), relative(x.grad, their_x), of_cores]


if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("authors", sys.argv[1])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for dtype in (torch.float64, torch.float32):
        found = [
            compare(module.TTMLoRALinearLayer, dtype, widths, rank, part, init)
            for widths in ((640, 640), (768, 320))
            for rank in (1, 2, 3)
            for part in ("lora", "ttv")
            for init in ("repaired", "reference")
        ]
        worst = [max(column) for column in zip(*found, strict=True)]
        figures = "output {:.1e}, gradient of x {:.1e}, of the cores {:.1e}".format(*worst)
        print(f"{str(dtype)[6:]}: {figures} ({len(found)} settings)")  # noqa: T201
