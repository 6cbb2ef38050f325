"""unpermute on both backends: the transpose of permute, and combine with weights of one."""

from __future__ import annotations

import pytest
import torch
from gradients import gradients
from routed_pairs import some_ids
from tolerances import assert_close

from moe.kernels.combine import permute, unpermute
from moe.kernels.combine.reference import combine_reference
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

D = 33


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("T", "K"), [(0, 2), (1, 1), (7, 3), (31, 8)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sums_the_rows_of_each_token(backend, T, K, dtype, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    order_N, inverse_N, _ = permute_index(some_ids(T, 10, K).flatten(), 10)
    generator = torch.Generator().manual_seed(T)
    y_ND = torch.randn(T * K, D, generator=generator).to(dtype).requires_grad_()
    cotangent_TD = torch.randn(T, D, generator=generator).to(dtype)
    on_device = (t.to(device) for t in (y_ND, order_N, inverse_N))
    out_TD = unpermute(*on_device, K, backend=backend)
    assert out_TD.dtype == dtype and out_TD.shape == (T, D)
    assert_close("out", out_TD.cpu(), combine_reference(y_ND.double(), torch.ones(T, K), inverse_N))
    actual = gradients(out_TD, cotangent_TD.to(device), y=y_ND)["y"]
    assert torch.equal(actual, permute(cotangent_TD, order_N, inverse_N, K, backend="torch"))


def test_what_does_not_fit_is_refused():
    order_N = torch.arange(7)
    with pytest.raises(ValueError, match="7 rows are not top_k=2 rows for each of some tokens"):
        unpermute(torch.zeros(7, D), order_N, order_N, 2)
    with pytest.raises(ValueError, match="must hold 8 rows"):
        unpermute(torch.zeros(8, D), order_N, order_N, 2)
