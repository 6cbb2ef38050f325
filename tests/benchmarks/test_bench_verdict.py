"""The verdict on results: what is right passes in every dtype, and each way of being wrong is named."""

from __future__ import annotations

import pytest
import torch

from benchmarks.problem import RESULTS, make_problem
from benchmarks.rivals import RIVALS, in_halves, in_turns, swapped
from benchmarks.shapes import Shape
from benchmarks.variants import NotHereError, Runner, ours, torch_grouped_mm
from benchmarks.verdict import complaints, judge

SHAPE = Shape(T=61, H=32, I=24, E=8, K=3)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ON_CPU = {"ours": ours, "torch_grouped_mm": torch_grouped_mm} | {
    name: RIVALS[name] for name in ("hf_eager", "hf_grouped_mm")
}


def verdict(results: dict[str, torch.Tensor], dtype: torch.dtype) -> str:
    return complaints(judge(make_problem(SHAPE, dtype, "cpu"), results), dtype)


@pytest.fixture(params=DTYPES.values(), ids=DTYPES)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("build", ON_CPU.values(), ids=ON_CPU)
def test_every_implementation_of_the_cpu_is_right(build, dtype):
    problem = make_problem(SHAPE, dtype, "cpu")
    results = Runner(problem, build(problem)).results()
    assert set(results) == set(RESULTS)
    assert verdict(results, dtype) == ""


@pytest.mark.parametrize("name", RESULTS)
def test_each_wrong_result_is_named(name, dtype):
    problem = make_problem(SHAPE, dtype, "cpu")
    right = Runner(problem, ours(problem)).results()
    for wrong in (right[name] * 1.02, right[name].roll(1, 0), torch.zeros_like(right[name])):
        text = verdict(right | {name: wrong}, dtype)
        assert text.startswith(name), f"{name} changed, the verdict is {text!r}"
    broken = right[name].clone()
    broken.view(-1)[-1] = torch.nan
    assert verdict(right | {name: broken}, dtype).startswith(f"{name} errs by nan")


def test_one_wrong_element_is_found(dtype):
    problem = make_problem(SHAPE, dtype, "cpu")
    right = Runner(problem, ours(problem)).results()
    right["grad_down"][5, 3, 7] += 0.5
    assert verdict(right, dtype).startswith("grad_down errs by 0.")


def test_coarser_products_are_wrong_in_fp32():
    narrow = make_problem(SHAPE, torch.bfloat16, "cpu")
    results = {name: tensor.float() for name, tensor in Runner(narrow, ours(narrow)).results().items()}
    assert verdict(results, torch.float32)


def test_what_is_saved_is_x_h_weights_and_index():
    problem = make_problem(SHAPE, torch.bfloat16, "cpu")
    pairs, tokens = SHAPE.pairs, SHAPE.T
    x_and_h = 2 * tokens * SHAPE.H + 4 * pairs * SHAPE.I
    weights_and_index = 4 * pairs + 2 * 8 * pairs + 4 * SHAPE.E
    assert Runner(problem, ours(problem)).saved_bytes() == x_and_h + weights_and_index


def test_fp8_products_are_held_to_their_own_rule():
    shape = Shape(T=64, H=128, I=128, E=4, K=2)
    problem = make_problem(shape, torch.bfloat16, "cpu")
    variants = [ours(problem, precision="fp8", wide_into_activation=wide) for wide in (False, True)]
    assert [variant.fp8_products for variant in variants] == [3, 1]
    results, wide_results = (Runner(problem, variant).results() for variant in variants)
    assert complaints(judge(problem, results), torch.bfloat16, 3) == ""
    assert complaints(judge(problem, results), torch.bfloat16)  # so FP8 it was
    assert complaints(judge(problem, wide_results), torch.bfloat16, 1) == ""
    assert complaints(judge(problem, results), torch.bfloat16, 1)  # so others were wide
    results["grad_down"] *= 1.1
    assert complaints(judge(problem, results), torch.bfloat16, 3).startswith("grad_down differs by")


def test_layouts_of_rivals_are_undone():
    w_EGD = torch.randn(2, 6, 4)
    gate, up = w_EGD.chunk(2, dim=1)
    assert torch.equal(in_turns(w_EGD)[:, 0::2], gate)
    assert torch.equal(in_turns(w_EGD)[:, 1::2], up)
    assert torch.equal(in_halves(in_turns(w_EGD)), w_EGD)
    assert torch.equal(swapped(w_EGD), torch.cat([up, gate], dim=1))
    assert torch.equal(swapped(swapped(w_EGD)), w_EGD)


@pytest.mark.parametrize("name", sorted(set(RIVALS) - set(ON_CPU)))
def test_a_rival_that_cannot_run_here_says_so(name):
    with pytest.raises(NotHereError, match="CUDA only"):
        RIVALS[name](make_problem(SHAPE, torch.float32, "cpu"))
