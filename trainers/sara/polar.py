"""The subgradient of the nuclear norm: the polar factor U V^T of a matrix P = U S V^T (Watson 1992).

Singular values that are zero stay zero in it, which is the subgradient of least norm.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Quintic Newton-Schulz steps x -> a x + b x^3 + c x^5, each the best after those before it for singular values in
# [1e-3, 1] (Amsel et al. 2025, The Polar Express, arXiv 2505.16932).
STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)


def polar_factor(matrix: Tensor, exact: bool = False) -> Tensor:
    """U V^T of a matrix (O, I), in fp32: by singular values in fp64, or by products alone, to a cosine above 0.99."""
    return _by_decomposition(matrix) if exact else _by_products(matrix)


def _by_decomposition(matrix: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    kept = s > s.max() * max(matrix.shape) * torch.finfo(torch.float64).eps
    return (u[:, kept] @ vh[kept]).float()


def _by_products(matrix: Tensor) -> Tensor:
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T).float()
    x = x / x.norm().clamp(min=torch.finfo(torch.float32).tiny)
    for a, b, c in STEPS:
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T
