import torch
from layers import layer

from sparselab.misprints import compensate_one_by_one, mask_by_hessian_diagonal, mask_by_inverse_diagonal
from sparselab.solvers import damped, layer_error, reconstruct


def test_the_formulas_are_as_they_are_printed():
    W, _, H = layer(4, 10)
    inverse = torch.linalg.inv(damped(H, 0.01))
    for mask, divisor in ((mask_by_hessian_diagonal, damped(H, 0.01)), (mask_by_inverse_diagonal, inverse)):
        importance = [(float(W[i, j] ** 2 / divisor[j, j]), i, j) for i in range(4) for j in range(10)]
        expected = torch.ones(4, 10, dtype=torch.bool)
        for _, i, j in sorted(importance)[:20]:
            expected[i, j] = False
        assert torch.equal(mask(W, H, "50%"), expected)
    keep = mask_by_inverse_diagonal(W, H, "50%")
    expected = W.clone()
    for i in range(4):
        gone = ~keep[i]
        expected[i, gone] = 0
        for j in range(10):
            if keep[i, j]:
                expected[i, j] += -torch.sum(W[i, gone] * inverse[j, gone]) / inverse[j, j]
    torch.testing.assert_close(compensate_one_by_one(W, H, keep), expected)


def test_they_are_worse_than_the_right_ones():
    W, _, H = layer(24, 48)
    H = H * torch.outer(*2 * [torch.linspace(0.2, 3, 48, dtype=torch.float64)])  # inputs of different size
    right, wrong = mask_by_inverse_diagonal(W, H, "50%"), mask_by_hessian_diagonal(W, H, "50%")
    assert layer_error(W, W * right, H) < 0.5 * layer_error(W, W * wrong, H)
    Hd = damped(H, 0.01)
    best, printed = reconstruct(W, Hd, right), compensate_one_by_one(W, H, right)
    assert layer_error(W, best, Hd) < 0.5 * layer_error(W, printed, Hd)
