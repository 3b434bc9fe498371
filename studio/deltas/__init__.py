"""The algebra of weight changes: forms, exact rewritings between them, sums, inner products, compression."""

from studio.deltas.compression import Compressed, compress, thin_svd
from studio.deltas.delta import WeightDelta
from studio.deltas.dense import Dense
from studio.deltas.hadamard import Hadamard
from studio.deltas.kronecker import Kronecker
from studio.deltas.lazy_sum import Sum, smallest, total
from studio.deltas.low_rank import LowRank
from studio.deltas.overlap import Overlaps
from studio.deltas.sparse import Sparse
from studio.deltas.ternary import Ternary
from studio.deltas.tucker import Tucker

__all__ = [
    "Compressed",
    "Dense",
    "Hadamard",
    "Kronecker",
    "LowRank",
    "Overlaps",
    "Sparse",
    "Sum",
    "Ternary",
    "Tucker",
    "WeightDelta",
    "compress",
    "smallest",
    "thin_svd",
    "total",
]
