"""What only a GPU can show of routing: no wait for the host, and sums over more rows than programs."""

from __future__ import annotations

import pytest
import torch
from tolerances import assert_close

from moe.kernels.permute_index import pad_to_tiles, permute_index
from moe.kernels.token_drop import token_rounding
from moe.kernels.topk_route import topk_route_with_sums

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def route_and_pad(logits_TE: torch.Tensor) -> torch.Tensor:
    """Every op of routing, forward and backward."""
    ids_TK, weights_TK, sums = topk_route_with_sums(logits_TE, 8, num_sequences=4)
    ids_TK, weights_TK, _ = token_rounding(ids_TK, weights_TK, logits_TE.shape[1], 128)
    ends_E = permute_index(ids_TK.flatten(), logits_TE.shape[1])[2]
    pad_to_tiles(ends_E, ids_TK.numel(), 128)
    total = weights_TK.square().sum() + sums.shares_BE.square().sum() + sums.z_B.sum()
    return torch.autograd.grad(total, logits_TE)[0]


def test_never_waits_for_the_host():
    logits_TE = torch.randn(4096, 128, device="cuda", requires_grad=True)
    expected_TE = route_and_pad(logits_TE)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        actual_TE = route_and_pad(logits_TE)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert torch.equal(actual_TE, expected_TE)


@pytest.mark.parametrize(("E", "K"), [(128, 8), (512, 10), (1024, 16)])
def test_sums_over_many_rows(E, K):
    logits_TE = torch.randn(65_536 + 4 * 17, E, device="cuda", requires_grad=True)
    results = []
    for backend in ("triton", "torch"):
        sums = topk_route_with_sums(logits_TE, K, num_sequences=4, backend=backend)[2]
        total = sums.shares_BE.square().sum() + sums.z_B.sum()
        (grad_TE,) = torch.autograd.grad(total, logits_TE)
        results.append((sums.counts_BE.float(), sums.shares_BE, sums.z_B, grad_TE))
    for name, actual, expected in zip(("counts", "shares", "z", "logits.grad"), *results, strict=True):
        assert_close(name, actual, expected)
