"""Can a transform of rank R > 1 be learned? The paper's start against ours, on a transform with a known answer.

    python docs/methods/tlora-symmetry.py

Target: T = 1 + M_1 (x) M_2 (x) M_3 on 80 numbers (4 x 4 x 5), the sum of two Kronecker products. Both starts have
R = 2, the same number of parameters, and learn from the same minibatches. About a minute on one core.
"""

import torch

from studio.method import Origin, method_from
from studio.patch import LayerCall, LayerShape
from studio.tensor_ring import ring_shift

WIDTH, SIDES, STEPS, BATCH, SEEDS = 80, (4, 4, 5), 2000, 32, (0, 1, 2)


def planted(generator: torch.Generator) -> torch.Tensor:
    """M_1 (x) M_2 (x) M_3, of the size of the identity."""
    parts = [torch.randn(s, s, generator=generator) / s**0.5 for s in SIDES]
    return torch.kron(torch.kron(parts[0], parts[1]), parts[2])


def learn(init: str, rank: int, learning_rate: float, seed: int) -> tuple[float, float, int]:
    """The share of the planted change that is not learned, the second Schmidt value of T over the first, parameters."""
    generator = torch.Generator().manual_seed(seed)
    target = planted(generator)
    method = method_from({"kind": "tlora", "residual": "none", "transform_rank": rank, "init": init})
    patch = method.patch("site", LayerShape("linear", (WIDTH, WIDTH)), Origin("planted", seed))
    optimizer = torch.optim.AdamW(patch.parameters(), learning_rate)
    call = LayerCall(torch.nn.Identity())
    for _ in range(STEPS):
        x = torch.randn(BATCH, WIDTH, generator=generator)
        optimizer.zero_grad()
        (patch.input_term(x, call) - x @ target.T).square().mean().backward()
        optimizer.step()
    change = ring_shift(torch.eye(WIDTH)[:, :, None], patch.cores("E"), patch.spread)[:, :, 0].T.detach()
    k = WIDTH // SIDES[0]
    cut = (torch.eye(WIDTH) + change).view(SIDES[0], k, SIDES[0], k).permute(0, 2, 1, 3).reshape(SIDES[0] ** 2, -1)
    values = torch.linalg.svdvals(cut)
    left = (change - target).norm() / target.norm()
    return float(left**2), float(values[1] / values[0]), sum(p.numel() for p in patch.parameters())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for learning_rate in (1e-4, 1e-3):
        for init, rank in (("repaired", 1), ("reference", 2), ("repaired", 2)):
            runs = [learn(init, rank, learning_rate, seed) for seed in SEEDS]
            left = ", ".join(f"{100 * run[0]:.2f} %" for run in runs)
            second = ", ".join(f"{run[1]:.1e}" for run in runs)
            name = f"lr {learning_rate}  {init} R={rank} ({runs[0][2]} numbers)"
            print(f"{name}: not learned {left}; second value {second}")  # noqa: T201
