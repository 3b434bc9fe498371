"""Orthogonal Adaptation: the frozen basis (method file, section 1 and 4.9)."""

import torch
from test_methods import tiny_adapter

from studio.method import Origin, method_from
from studio.patch import LayerShape
from trainers.orthogonal import _shared_columns, orthonormal_rows


def test_the_shared_matrix_is_orthonormal_to_1e_14():
    for width in (20, 320, 768, 1280):
        matrix = torch.from_numpy(_shared_columns(width, list(range(width))))
        error = (matrix.T @ matrix - torch.eye(width, dtype=torch.float64)).abs().max()
        assert error < 1e-14, width


def test_stored_rows_are_orthonormal_to_1e_6():
    rows = orthonormal_rows(640, 16, "a cat", "unet.site")
    assert (rows @ rows.T - torch.eye(16)).abs().max() < 1e-6


def test_directions_belong_to_the_concept_and_not_to_the_seed():
    method = method_from({"kind": "orthogonal", "rank": 4})
    shape = LayerShape("linear", (8, 64))
    cat, cat_again, dog = (
        method.patch("unet.site", shape, Origin(concept, seed)).down
        for concept, seed in (("cat", 1), ("cat", 2), ("dog", 1))
    )
    assert torch.equal(cat, cat_again)
    assert not torch.equal(cat, dog)


def test_concepts_with_disjoint_columns_do_not_meet():
    one, other = torch.from_numpy(_shared_columns(64, [1, 5])), torch.from_numpy(_shared_columns(64, [2, 9]))
    assert (one.T @ other).abs().max() < 1e-14


def test_the_basis_is_frozen_and_only_the_up_projection_learns():
    _, _, adapter = tiny_adapter("orthogonal")
    patch = next(iter(adapter.patches.values()))["main"]
    assert [name for name, _ in patch.named_parameters()] == ["up"]
    assert not patch.down.requires_grad
    assert patch.up.detach().abs().sum() == 0
    assert "down" in patch.state_dict()


def test_the_basis_never_changes_between_versions():
    # Golden numbers: if these change, old and new concepts meet where they must not.
    rows = orthonormal_rows(16, 2, "golden", "unet.site")
    expected = torch.tensor(GOLDEN)
    torch.testing.assert_close(rows[:, :4], expected, rtol=0, atol=1e-6)


GOLDEN = [[-0.3518509, 0.3383295, -0.3118063, -0.2733005], [-0.25, 0.25, -0.25, -0.25]]
