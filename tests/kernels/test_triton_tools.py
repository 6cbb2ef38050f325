"""The interpreter and the compile gate themselves: kernels are judged by them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from compile_gate import Request, assert_fits, compile_in_subprocess

EXAMPLES = Path(__file__).parents[1] / "triton_examples.py"


def launch(kernel: str, *tensors: torch.Tensor, **sizes: int) -> None:
    import triton_examples

    getattr(triton_examples, kernel)[(1,)](*tensors, **sizes)


NARROW = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_casts_round_as_torch(dtype, triton_device):
    special = torch.tensor([0.0, -0.0, 1.00390625, 1.01171875, 1.0625, 1.1875, 1e-40, 2**-10, 1.1 * 2**-10])
    x = torch.cat((special, torch.randn(1015, generator=torch.Generator().manual_seed(0)))).to(triton_device)
    narrow, wide = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    launch("narrow_and_widen", x, narrow, wide, BLOCK=1024)
    assert torch.equal(narrow.float(), x.to(dtype).float())
    assert torch.equal(wide, narrow.float())


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_what_is_too_large_saturates_in_fp8_only(dtype, triton_device):
    x = torch.tensor([1e39, -torch.inf, 1e38, torch.nan], device=triton_device)
    narrow, wide = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    launch("narrow_and_widen", x, narrow, wide, BLOCK=4)
    if dtype == torch.bfloat16:
        assert wide[:3].tolist() == [torch.inf, -torch.inf, torch.tensor(1e38).bfloat16().item()]
    else:
        largest = torch.finfo(dtype).max
        assert wide[:3].tolist() == [largest, -largest, largest]
    assert narrow.float()[3].isnan() and wide[3].isnan()


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_dot_of_narrow_numbers_is_that_of_fp32(dtype, triton_device):
    generator = torch.Generator().manual_seed(0)
    # Small integers: every sum is exact in any order.
    a, b = (torch.randint(-8, 9, (32, 32), generator=generator).to(triton_device, dtype) for _ in "ab")
    out = torch.empty(32, 32, device=triton_device)
    launch("dot", a, b, out, BLOCK=32)
    assert torch.equal(out, a.float() @ b.float())


def test_dot_scaled_is_that_of_scaled_fp32(triton_device):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-8, 9, (64, 64), generator=generator).to(torch.float8_e4m3fn) for _ in "ab")
    a_scales, b_scales = (torch.randint(120, 130, (64, 2), generator=generator).byte() for _ in "ab")
    out = torch.empty(64, 64, device=triton_device)
    on_device = (t.to(triton_device) for t in (a, a_scales, b, b_scales))
    launch("dot_scaled", *on_device, out, BLOCK=64)
    a_wide, b_wide = ((2.0 ** (s.float() - 127)).repeat_interleave(32, dim=1) for s in (a_scales, b_scales))
    assert torch.equal(out.cpu(), (a.float() * a_wide) @ (b.float() * b_wide.T))


def test_sort_of_rows(triton_device):
    x = torch.randint(-99, 99, (4, 64), dtype=torch.int32, generator=torch.Generator().manual_seed(0))
    out = x.clone().to(triton_device)
    launch("sort_rows", out, ROWS=4, BLOCK=64)
    assert torch.equal(out.cpu(), x.sort(dim=1).values)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do what the interpreter refuses")
@pytest.mark.parametrize("kernel", ["double", "total"])
@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bf16"), (torch.float8_e4m3fn, "fp8e4nv")])
def test_arithmetic_on_narrow_numbers_is_refused(dtype, name, kernel, triton_device):
    with pytest.raises(Exception, match=rf"in {name}; a kernel widens it with .to\(tl.float32\)"):
        launch(kernel, torch.ones(16).to(dtype), BLOCK=16)


@pytest.fixture(scope="module")
def compiled():
    in_bf16 = {"p_a": "*bf16:16", "p_b": "*bf16:16", "p_out": "*fp32:16"}
    return compile_in_subprocess(
        [
            Request(EXAMPLES, "spill", {"p_x": "*fp32:16"}, {"BLOCK": 128}, num_warps=1),
            Request(EXAMPLES, "dot", in_bf16, {"BLOCK": 64}, capability=90),
            Request(EXAMPLES, "dot", in_bf16, {"BLOCK": 64}, capability=100),
            Request(EXAMPLES, "double", {"p_x": "*fp32:16"}, {"BLOCK": 1024}),
            Request(EXAMPLES, "double", {"p_x": "*fp32"}, {"BLOCK": 1024}),
        ]
    )


def test_gate_sees_spilled_registers(compiled):
    assert compiled[0].spill_bytes > 0 and compiled[0].count("LDL") > 0
    with pytest.raises(AssertionError, match=r"spill sm_90 .* spilled bytes"):
        assert_fits(compiled[0])


def test_gate_sees_tensor_cores_of_each_architecture(compiled):
    assert_fits(compiled[1], instructions=["HGMMA"])
    assert_fits(compiled[2], instructions=["UTCHMMA"])
    with pytest.raises(AssertionError, match="no UTCHMMA"):
        assert_fits(compiled[1], instructions=["UTCHMMA"])
    assert compiled[1].shared_bytes >= 2 * 64 * 64 * 2  # both operands in bf16


def test_gate_knows_what_is_divisible_by_16(compiled):
    assert compiled[3].count("LDG.E.128") > 0
    assert compiled[4].count("LDG.E.128") == 0


def test_gate_says_what_does_not_compile():
    with pytest.raises(AssertionError, match=r"dot sm_90 .* does not compile"):
        compile_in_subprocess(
            [Request(EXAMPLES, "dot", {"p_a": "*fp32", "p_b": "*bf16", "p_out": "*fp32"}, {"BLOCK": 16})]
        )
