"""The algebra of weight changes, in fp64: every form against its own dense numbers."""

import itertools

import pytest
import torch

from studio.deltas import (
    Dense,
    Hadamard,
    Kronecker,
    LowRank,
    Overlaps,
    Sparse,
    Sum,
    Ternary,
    Tucker,
    compress,
    smallest,
    thin_svd,
    total,
)
from studio.deltas.ternary import pack, unpack

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def low_rank(shape, rank, seed=0):
    return LowRank.of(numbers(rank, *shape[1:], seed=seed), numbers(shape[0], rank, seed=seed + 1), 0.7)


def sparse(shape, count=9, seed=0):
    size = torch.Size(shape).numel()
    index = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    return Sparse(index, numbers(count, seed=seed), shape)


def forms(shape):
    """Every form of a delta of a linear (24, 18) or a convolution (24, 18, 3, 3)."""
    kernel = shape[2:]
    core = numbers(4, 3, *kernel)
    yield "low rank", low_rank(shape, 3)
    yield "dense", Dense(numbers(*shape))
    yield "sparse", sparse(shape)
    yield "tucker", Tucker(core, (numbers(24, 4), numbers(18, 3)))
    yield (
        "tucker, thin inside",
        Tucker(numbers(9, 2, *[1] * len(kernel)), (numbers(24, 9), numbers(18, 2), *[numbers(k, 1) for k in kernel])),
    )
    yield "kronecker, full", Kronecker(Dense(numbers(4, 6)), Dense(numbers(6, 3, *kernel)))
    yield "kronecker, thin right", Kronecker(Dense(numbers(4, 6)), low_rank((6, 3, *kernel), 2))
    yield "kronecker, thin left", Kronecker(low_rank((4, 6), 1), Dense(numbers(6, 3, *kernel)))
    yield "hadamard", Hadamard(low_rank(shape, 2), low_rank(shape, 3, seed=5))
    yield "ternary", Ternary.of(numbers(*shape), 0.3)
    yield "sum", Sum((low_rank(shape, 2), sparse(shape), Dense(numbers(*shape))))


FORMS = {f"{name} {len(shape)}": delta for shape in ((24, 18), (24, 18, 3, 3)) for name, delta in forms(shape)}


@pytest.mark.parametrize("delta", FORMS.values(), ids=FORMS)
def test_every_form_agrees_with_its_dense_numbers(delta):
    dense = delta.dense()
    assert tuple(dense.shape) == delta.shape
    matrix = dense.reshape(24, -1)
    torch.testing.assert_close(delta.matrix(), matrix, **EXACT)
    torch.testing.assert_close(delta.rows(5, 14), matrix[5:14], **EXACT)
    x, y = numbers(delta.width, 4), numbers(24, 4)
    torch.testing.assert_close(delta.matvec(x), matrix @ x, **EXACT)
    torch.testing.assert_close(delta.rmatvec(y), matrix.T @ y, **EXACT)
    torch.testing.assert_close((delta * -1.5).dense(), -1.5 * dense, **EXACT)
    torch.testing.assert_close(torch.cat([b for _, b in delta.blocks(100)]), matrix, **EXACT)
    assert delta.norm() == pytest.approx(float(dense.norm()), rel=1e-12)
    assert delta.nbytes > 0
    low = delta.low_rank()
    if low is not None:
        torch.testing.assert_close(low.dense(), dense, **EXACT)


@pytest.mark.parametrize("dims", [2, 4])
def test_inner_products_of_all_pairs_of_forms_equal_the_dense_ones(dims):
    own = [delta for name, delta in FORMS.items() if name.endswith(str(dims))]
    for one, other in itertools.product(own, own):
        assert one.inner(other) == pytest.approx(float((one.dense() * other.dense()).sum()), rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("dims", [2, 4])
def test_sums_of_all_pairs_of_forms_equal_the_dense_ones_in_either_order(dims):
    own = [delta for name, delta in FORMS.items() if name.endswith(str(dims))]
    for one, other in itertools.product(own, own):
        torch.testing.assert_close((one + other).dense(), one.dense() + other.dense(), **EXACT)
        torch.testing.assert_close((one - other).dense(), one.dense() - other.dense(), **EXACT)
        torch.testing.assert_close(smallest(one + other).dense(), one.dense() + other.dense(), **EXACT)


def test_loha_is_low_rank_by_the_khatri_rao_product():
    delta = FORMS["hadamard 4"]
    assert delta.low_rank().rank == 2 * 3


def test_lokr_with_a_low_rank_factor_is_low_rank():
    assert FORMS["kronecker, thin right 4"].low_rank().rank == 4 * 2
    assert FORMS["kronecker, thin left 2"].low_rank().rank == 1 * 3
    assert FORMS["kronecker, full 2"].low_rank() is None


def test_a_tucker_convolution_is_a_locon_of_the_smaller_side():
    assert FORMS["tucker 4"].low_rank().rank == 4
    assert FORMS["tucker, thin inside 4"].low_rank().rank == 2
    down, up = FORMS["tucker 4"].low_rank().kernel_factors()
    assert down.shape == (4, 18, 3, 3)
    assert up.shape == (24, 4, 1, 1)


def test_low_rank_and_sparse_terms_join_without_loss_and_other_forms_wait():
    shape = (24, 18)
    thin = total([low_rank(shape, 2), low_rank(shape, 3, seed=7)])
    assert isinstance(thin, LowRank)
    assert thin.rank == 5
    assert isinstance(total([sparse(shape), sparse(shape, seed=3)]), Sparse)
    assert isinstance(total([sparse(shape), low_rank(shape, 2)]), Sum)
    with pytest.raises(ValueError, match="shapes"):
        total([low_rank((24, 18), 2), low_rank((18, 24), 2)])


def test_the_smallest_form_turns_dense_where_the_ranks_add_up_too_high():
    assert isinstance(smallest(low_rank((24, 18), 12)), Dense)
    assert isinstance(smallest(low_rank((24, 18), 3)), LowRank)
    assert isinstance(smallest(Kronecker(Dense(numbers(4, 6)), Dense(numbers(6, 3)))), Kronecker)


@pytest.mark.parametrize("delta", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("tolerance", [0.5, 0.1, 1e-3])
def test_compression_stays_within_the_tolerance_and_says_its_error(delta, tolerance):
    found = compress(delta, tolerance=tolerance)
    error = float((found.delta.dense() - delta.dense()).norm() / delta.dense().norm())
    assert error <= tolerance + 1e-9
    assert found.error == pytest.approx(error, abs=1e-7)
    assert found.energy == pytest.approx(1 - error**2, abs=1e-7)


def test_compression_to_a_rank_is_the_best_there_is():
    delta = low_rank((24, 18, 3, 3), 6) + sparse((24, 18, 3, 3))
    singular = torch.linalg.svdvals(delta.dense().flatten(1))
    for rank in (1, 3, 6, 24):
        found = compress(delta, rank=rank)
        assert found.delta.rank <= rank
        assert found.error == pytest.approx(
            float((singular[rank:].square().sum() / singular.square().sum()) ** 0.5), abs=1e-7
        )


def test_the_factored_svd_equals_the_dense_one():
    delta = low_rank((24, 18, 3, 3), 5)
    svd, dense = thin_svd(delta), torch.linalg.svdvals(delta.dense().flatten(1))
    torch.testing.assert_close(svd.singular, dense[:5], **EXACT)
    torch.testing.assert_close(svd.left.T @ svd.left, torch.eye(5, dtype=torch.float64), **EXACT)
    torch.testing.assert_close((svd.left * svd.singular) @ svd.right, delta.matrix(), **EXACT)


def test_a_zero_delta_compresses_to_zero():
    found = compress(Dense(torch.zeros(5, 4)), tolerance=0.1)
    assert found.error == 0
    assert not found.delta.dense().any()


def test_packed_signs_come_back():
    signs = torch.randint(-1, 2, (7, 13), generator=torch.Generator().manual_seed(0), dtype=torch.int16)
    assert torch.equal(unpack(pack(signs), 13), signs)
    assert pack(signs).shape == (7, 3)


def test_ternary_keeps_the_share_asked_for_and_scales_rows_by_least_squares():
    values = numbers(40, 50)
    delta = Ternary.of(values, 0.25)
    dense = delta.dense()
    assert int((dense != 0).sum()) == 500
    for row, own in zip(dense, values):
        best = (own * row.sign()).sum() / row.sign().square().sum()
        torch.testing.assert_close(row.abs().max(), best, **EXACT)


def test_overlaps_of_all_pairs_equal_the_dense_ones():
    deltas = [low_rank((24, 18, 3, 3), rank, seed=rank) for rank in (2, 3, 5)]
    overlaps = Overlaps(deltas)
    dense = [delta.matrix() for delta in deltas]
    for i, j in itertools.product(range(3), range(3)):
        a, b = dense[i], dense[j]
        scale = a.norm() * b.norm()
        assert overlaps.inner[i, j] == pytest.approx(float((a * b).sum()), abs=1e-10)
        assert overlaps.cosine[i, j] == pytest.approx(float((a * b).sum() / scale), abs=1e-12)
        assert overlaps.input_overlap[i, j] == pytest.approx(float((a @ b.T).norm() / scale), abs=1e-12)
        assert overlaps.output_overlap[i, j] == pytest.approx(float((a.T @ b).norm() / scale), abs=1e-12)
    one, other = (torch.linalg.qr(deltas[i].down.T)[0] for i in (0, 2))
    torch.testing.assert_close(overlaps.principal_angles(0, 2).cos(), torch.linalg.svdvals(one.T @ other))
    assert overlaps.principal_angles(1, 1).abs().max() < 1e-5
