from itertools import product

import pytest
import torch
from layers import layer

from sparselab.errors import SingularHessianError
from sparselab.solvers import admm, best_mask, damped, layer_error, parse_sparsity, reconstruct, sparsegpt


@pytest.mark.parametrize("sparsity", ["50%", "2:4", "25%"])
def test_no_other_mask_is_better(sparsity):
    W, _, H = layer(3, 8)
    keep = best_mask(W, H, sparsity)
    pattern = parse_sparsity(sparsity)
    for row in range(3):
        w = W[row : row + 1]
        best = layer_error(w, reconstruct(w, H, keep[row : row + 1]), H)
        errors = []
        for bits in product([True, False], repeat=8):
            mask = torch.tensor([bits])
            groups = mask.view(-1, 4).sum(dim=1).tolist() if sparsity == "2:4" else [int(mask.sum())]
            if all(kept == round((1 - pattern.fraction) * 8 / len(groups)) for kept in groups):
                errors.append(layer_error(w, reconstruct(w, H, mask), H))
        assert len(errors) > 20
        assert best == pytest.approx(min(errors), rel=1e-9)
        assert bool(keep[row].sum() == round((1 - pattern.fraction) * 8))


def test_methods_are_not_below_it():
    W, _, H = layer(16, 12)
    Hd = damped(H, 0.01)
    best = layer_error(W, reconstruct(W, Hd, best_mask(W, Hd, "2:4")), Hd)
    for method in (sparsegpt, admm):
        assert layer_error(W, reconstruct(W, Hd, method(W, H, "2:4") != 0), Hd) >= best


def test_masks_in_pieces_give_the_same(monkeypatch):
    W, _, H = layer(5, 10)
    whole = best_mask(W, H, "50%")
    monkeypatch.setattr("sparselab.solvers.enumeration._ELEMENTS_AT_ONCE", 400)
    assert torch.equal(best_mask(W, H, "50%"), whole)


def test_extremes():
    W, _, H = layer(2, 6)
    assert best_mask(W, H, "0%").all()
    assert not best_mask(W, H, "100%").any()


def test_bad_arguments():
    W, X, H = layer(2, 40)
    with pytest.raises(ValueError, match="expected rows with at most 200000 masks of 50%, received rows of 40 inputs"):
        best_mask(W, H, "50%")
    few = X[:3, :8]
    with pytest.raises(SingularHessianError, match="pass damped"):
        best_mask(W[:, :8], few.T @ few, "50%")
