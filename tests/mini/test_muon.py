"""Muon: against torch's, which computes in bf16, and against singular values."""

import pytest
import torch

from kolors_ref.mini import muon
from kolors_ref.mini.muon import Muon, orthogonalised

SHAPES = {"wide": (12, 30), "tall": (40, 9), "kernel": (16, 8, 3, 3)}


def normal(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", [(12, 30), (40, 9)])
def test_singular_values_are_brought_near_one(shape, monkeypatch):
    """Five times the quintic, of each singular value; the vectors stay."""
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.float64)
    matrix = normal(shape, 0, torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert 0.6 < values.min() < values.max() < 1.3
    torch.testing.assert_close(orthogonalised(matrix), left @ values.diag() @ right, rtol=0, atol=1e-12)


def test_a_matrix_of_zeros_stays_one():
    assert torch.equal(orthogonalised(torch.zeros(3, 4)), torch.zeros(3, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_those_of_torch(dtype, monkeypatch):
    """In bf16 up to the order of its roundings, in fp32 up to bf16's own error."""
    monkeypatch.setattr(muon, "fast_dtype", lambda device: dtype)
    ours = [normal(shape, seed) for seed, shape in enumerate(SHAPES.values())]
    theirs = [matrix.clone().flatten(1) for matrix in ours]
    first = [matrix.clone() for matrix in theirs]
    optimizers = (
        Muon(ours, weight_decay=0.1),
        torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    )
    for step, rate in enumerate((0.1, 0.02, 0.05)):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = normal(mine.shape, 10 + step)
            other.grad = mine.grad.flatten(1)
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
    for mine, other, before in zip(ours, theirs, first, strict=True):
        assert (mine.flatten(1) - other).norm() < 0.02 * (other - before).norm()
