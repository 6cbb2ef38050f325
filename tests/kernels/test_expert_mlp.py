"""expert_mlp against its reference in float64: output and every gradient, expert by expert."""

from __future__ import annotations

import pytest
import torch
from gradients import gradients
from tolerances import assert_close

from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.expert_mlp.reference import expert_mlp_reference

pytestmark = pytest.mark.usefixtures("poison_empty")

D, F = 16, 24


def inputs(rows_e: list[int], dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(rows_e) + len(rows_e))
    shapes = {
        "x": (sum(rows_e), D),
        "w_gate_up": (len(rows_e), 2 * F, D),
        "w_down": (len(rows_e), D, F),
    }
    tensors = {
        name: torch.randn(shape, generator=generator).div(shape[-1] ** 0.5 if name != "x" else 1).to(dtype)
        for name, shape in shapes.items()
    }
    return tensors, torch.tensor(rows_e).cumsum(0).to(torch.int32)


def uneven(num_rows: int, num_experts: int) -> list[int]:
    chosen = torch.randint(num_experts, (num_rows,), generator=torch.Generator().manual_seed(num_experts))
    return chosen.bincount(minlength=num_experts).tolist()


ROWS = {
    "one_row": [1],
    "one_expert": [63],
    "empty_ends": [0, 7, 0],
    "hot_expert": [1, 0, 61, 1],
    "uneven_16": uneven(63, 16),
    "mostly_empty_100": uneven(63, 100),
    "no_rows": [0, 0, 0],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows_e", ROWS.values(), ids=ROWS)
def test_equals_the_reference(rows_e, dtype):
    tensors, ends_e = inputs(rows_e, dtype)
    cotangent_RD = torch.randn(sum(rows_e), D, generator=torch.Generator().manual_seed(3)).to(dtype)
    actual = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
    expected = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    y_RD = expert_mlp(*actual.values(), ends_e)
    expected_y_RD = expert_mlp_reference(*expected.values(), ends_e)
    assert y_RD.dtype == dtype
    assert_close("y", y_RD, expected_y_RD)
    actual_grads = gradients(y_RD, cotangent_RD, **actual)
    expected_grads = gradients(expected_y_RD, cotangent_RD, **expected)
    assert_close("x.grad", actual_grads["x"], expected_grads["x"])
    for name in ("w_gate_up", "w_down"):
        for expert, rows in enumerate(rows_e):
            grad, expected_grad = actual_grads[name][expert], expected_grads[name][expert]
            # Expert by expert: a hot one must not hide a wrong gradient of a cold one.
            assert_close(f"{name}.grad of expert {expert} with {rows} rows", grad, expected_grad)
            assert rows or not grad.any(), "an expert without rows has a gradient of exact zeros"


def test_expanded_gradient():
    # The gradient of y.sum() has stride 0, which grouped_mm's backward refuses.
    tensors, ends_e = inputs([3, 0, 4], torch.float32)
    actual = [tensor.clone().requires_grad_() for tensor in tensors.values()]
    expected = [tensor.double().requires_grad_() for tensor in tensors.values()]
    expert_mlp(*actual, ends_e).sum().backward()
    expert_mlp_reference(*expected, ends_e).sum().backward()
    for name, ours, theirs in zip(tensors, actual, expected, strict=True):
        assert_close(f"{name}.grad", ours.grad, theirs.grad)


@pytest.mark.parametrize("name", ["x", "w_gate_up", "w_down", "nothing"])
def test_any_input_may_be_frozen(name):
    tensors, ends_e = inputs([3, 0, 4], torch.float32)
    if name in tensors:
        tensors[name].requires_grad_()
    y_RD = expert_mlp(*tensors.values(), ends_e)
    assert y_RD.requires_grad == (name in tensors)
    if name in tensors:
        y_RD.sum().backward()
        assert tensors[name].grad.any()


def shaped(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


ENDS_2 = torch.tensor([1, 3], dtype=torch.int32)
GOOD = ((3, 8), (2, 8, 8), (2, 8, 4))


@pytest.mark.parametrize(
    ("tensors", "ends_e", "message"),
    [
        (shaped((3, 1, 8), *GOOD[1:]), ENDS_2, r"got \[\(3, 1, 8\), \(2, 8, 8\), \(2, 8, 4\)\]"),
        (shaped(GOOD[0], (8, 8), GOOD[2]), ENDS_2, r"got \[\(3, 8\), \(8, 8\), \(2, 8, 4\)\]"),
        (shaped(*GOOD[:2], (8, 4)), ENDS_2, r"got \[\(3, 8\), \(2, 8, 8\), \(8, 4\)\]"),
        (shaped(*GOOD[:2], (2, 8, 8)), ENDS_2, r"needs down \[2, 8, 4\] .* got down \(2, 8, 8\)"),
        (shaped(GOOD[0], (2, 9, 8), GOOD[2]), ENDS_2, r"gate_up \(2, 9, 8\)"),
        (shaped((3, 4), *GOOD[1:]), ENDS_2, r"x \[R, 8\], got .* x \(3, 4\)"),
        (shaped(*GOOD), ENDS_2.long(), r"ends must be int32 of shape \[2\], got torch.int64 \(2,\)"),
        (shaped(*GOOD), ENDS_2[:1], r"ends must be int32 of shape \[2\], got torch.int32 \(1,\)"),
        (
            [torch.zeros(3, 8).bfloat16(), *shaped(*GOOD[1:])],
            ENDS_2,
            "x torch.bfloat16, gate_up torch.float32",
        ),
        (
            shaped(*GOOD, dtype=torch.float64),
            ENDS_2,
            "torch.float64 is not supported; allowed: torch.float32,",
        ),
        (
            shaped((3, 6), (2, 8, 6), (2, 6, 4)),
            ENDS_2,
            "model size 6 and expert hidden size 4 .* multiples of 4",
        ),
        (
            shaped((3, 8), (2, 6, 8), (2, 8, 3)),
            ENDS_2,
            "model size 8 and expert hidden size 3 .* multiples of 4",
        ),
        (
            shaped(*GOOD, dtype=torch.bfloat16),
            ENDS_2,
            "expert hidden size 4 must be multiples of 8 in torch.bfl",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tensors, ends_e, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(*tensors, ends_e)
