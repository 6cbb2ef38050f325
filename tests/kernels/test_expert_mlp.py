"""expert_mlp on all backends against its reference in float64: output, every gradient, expert by expert."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gradients import gradients
from routed_pairs import ROUTINGS, some_ids
from tolerances import assert_as_good_as_plain, assert_close
from torch import Tensor

from moe.kernels.expert_mlp import ACTIVATIONS, expert_mlp
from moe.kernels.expert_mlp.activation import activated, activation_backward, gated
from moe.kernels.expert_mlp.reference import expert_mlp_reference
from moe.kernels.permute_index import permute_index

pytestmark = pytest.mark.usefixtures("poison_empty")

D, F = 16, 24
NAMES = ("x", "w_gate_up", "w_down", "weights")
Named = dict[str, Tensor]


def inputs(T: int, E: int, K: int, sizes: tuple[int, int] = (D, F)) -> Named:
    """Of float64, scaled so that outputs are of order one."""
    generator = torch.Generator().manual_seed(T + E)
    width, hidden = sizes
    shapes = ((T, width), (E, 2 * hidden, width), (E, width, hidden))
    x, gate_up, down = (torch.randn(shape, generator=generator).double() for shape in shapes)
    weights = torch.rand(T, K, generator=generator).double() + 0.1
    return dict(zip(NAMES, (x, gate_up / width**0.5, down * (3 / hidden**0.5), weights), strict=True))


def in_dtype(tensors: Named, dtype: torch.dtype) -> Named:
    """Leaves; the combine weights stay in fp32 at least."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: t.to(wide if n == "weights" else dtype).requires_grad_() for n, t in tensors.items()}


def run(op: Any, tensors: Named, index: Any, cotangent_TD: Tensor, **options: Any) -> Named:
    y_TD = op(*tensors.values(), index, **options)
    return {"y": y_TD, **gradients(y_TD, cotangent_TD, **tensors)}


def check(
    routing: tuple[int, Tensor],
    dtype: torch.dtype,
    backend: str,
    device: str,
    *,
    sizes: tuple[int, int] = (D, F),
) -> None:
    E, ids_TK = routing
    T, K = ids_TK.shape
    index = permute_index(ids_TK.flatten(), E)
    rounded = {n: t.detach() for n, t in in_dtype(inputs(T, E, K, sizes), dtype).items()}
    cotangent_TD = torch.randn(T, sizes[0], generator=torch.Generator().manual_seed(3)).to(dtype)
    exact = run(expert_mlp_reference, in_dtype(rounded, torch.float64), index, cotangent_TD.double())
    plain = run(expert_mlp_reference, in_dtype(rounded, dtype), index, cotangent_TD)
    on_device = in_dtype({n: t.to(device) for n, t in rounded.items()}, dtype)
    device_index = tuple(t.to(device) for t in index)
    actual = run(expert_mlp, on_device, device_index, cotangent_TD.to(device), backend=backend)
    for name, tensor in actual.items():
        found = tensor.cpu()
        assert found.dtype == (torch.float32 if name == "weights" and dtype.itemsize < 8 else dtype)
        assert_as_good_as_plain(name, found, plain[name], exact[name], dtype=dtype)
        assert_close(name, found, exact[name], dtype=dtype)
    counts_E = ids_TK[(ids_TK >= 0) & (ids_TK < E)].bincount(minlength=E)
    for name in ("w_gate_up", "w_down"):
        for expert, rows in enumerate(counts_E.tolist()):
            grad, expected = actual[name][expert].cpu(), exact[name][expert]
            # Expert by expert: a hot one must not hide a wrong gradient of a cold one.
            assert_close(f"{name}.grad of expert {expert} with {rows} rows", grad, expected, dtype=dtype)
            assert rows or not grad.any(), "an expert without rows has a gradient of exact zeros"
    nowhere = (ids_TK < 0) | (ids_TK >= E)
    assert not actual["weights"].cpu()[nowhere].any(), "the weight of a sentinel has a gradient"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_torch_equals_the_reference(routing, dtype):
    check(routing, dtype, "torch", "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_triton_equals_the_reference(routing, dtype, triton_device):
    check(routing, dtype, "triton", triton_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_many_tokens(backend, dtype, triton_device):
    # Enough elements in every tensor for the mean difference to mean something.
    check((8, some_ids(600, 8, 2)), dtype, backend, triton_device if backend == "triton" else "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_activations_and_biases(backend, activation, dtype, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    E, ids_TK = ROUTINGS["sentinels"]
    T, K = ids_TK.shape
    index = permute_index(ids_TK.flatten(), E)
    generator = torch.Generator().manual_seed(5)
    # The clamps of clamped_swiglu are at seven. In bf16 a value beside a clamp may round to either side of
    # it, and which, is chance.
    scale = 5 if dtype == torch.float32 else 1
    tensors = inputs(T, E, K) | {"x": scale * torch.randn(T, D, generator=generator).double()}
    tensors["b_gate_up"] = torch.randn(E, 2 * F, generator=generator).double()
    tensors["b_down"] = torch.randn(E, D, generator=generator).double()
    rounded = {n: t.detach() for n, t in in_dtype(tensors, dtype).items()}
    cotangent_TD = torch.randn(T, D, generator=generator).to(dtype)

    def results(op: Any, leaves: Named, index: Any, **options: Any) -> Named:
        *inputs, b_gate_up, b_down = leaves.values()
        y_TD = op(*inputs, index, activation=activation, biases=(b_gate_up, b_down), **options)
        return {"y": y_TD, **gradients(y_TD, cotangent_TD.to(y_TD), **leaves)}

    exact = results(expert_mlp_reference, in_dtype(rounded, torch.float64), index)
    plain = results(expert_mlp_reference, in_dtype(rounded, dtype), index)
    on_device = in_dtype({n: t.to(device) for n, t in rounded.items()}, dtype)
    actual = results(expert_mlp, on_device, tuple(t.to(device) for t in index), backend=backend)
    for name, tensor in actual.items():
        assert_as_good_as_plain(name, tensor.cpu(), plain[name], exact[name], dtype=dtype)
        assert_close(name, tensor.cpu(), exact[name], dtype=dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_backward_is_autograds(activation):
    gate, up = (t.requires_grad_() for t in torch.randn(2, 100).double() * 5)
    grad_a = torch.randn(100).double()
    value = gated(gate, activation)
    expected = torch.autograd.grad(activated(value, up, activation), (gate, up), grad_a)
    actual = torch.empty(100).double(), torch.empty(100).double()
    inputs = (t.detach() for t in (gate, up, value))
    activation_backward(*inputs, grad_a.clone(), activation=activation, out=actual)
    for name, found, right in zip(("gate", "up"), actual, expected, strict=True):
        assert_close(f"{activation} {name}", found, right)


@pytest.mark.parametrize("sizes", [(33, 47), (1, 1), (130, 70), (65, 129)], ids=str)
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_odd_sizes(backend, sizes, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    # Of a product of one number by one, which of two bf16 computations errs more is chance.
    for dtype in (torch.float32,) if sizes == (1, 1) else (torch.float32, torch.bfloat16):
        check(ROUTINGS["sentinels"], dtype, backend, device, sizes=sizes)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_reruns_are_bit_equal(backend, triton_device):
    E, ids_TK = ROUTINGS["uneven_16"]
    device = triton_device if backend == "triton" else "cpu"
    tensors = {n: t.to(device) for n, t in inputs(*ids_TK.shape[:1], E, ids_TK.shape[1]).items()}
    tensors = in_dtype(tensors, torch.bfloat16)
    index = permute_index(ids_TK.flatten().to(device), E)
    cotangent_TD = torch.ones(len(ids_TK), D, dtype=torch.bfloat16, device=device)
    first, second = (run(expert_mlp, tensors, index, cotangent_TD, backend=backend) for _ in range(2))
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def small(device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Named, Any]:
    ids_TK = torch.tensor([[0, 2], [2, 0], [0, 2], [0, 2]], device=device)
    tensors = {n: t.to(device) for n, t in inputs(4, 3, 2).items()}
    return in_dtype(tensors, dtype), permute_index(ids_TK.flatten(), 3)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_expanded_gradient(backend, triton_device):
    # The gradient of y.sum() has stride 0.
    tensors, index = small(triton_device)
    actual = torch.autograd.grad(
        expert_mlp(*tensors.values(), index, backend=backend).sum(), tensors.values()
    )
    exact = in_dtype({n: t.detach() for n, t in tensors.items()}, torch.float64)
    expected = torch.autograd.grad(expert_mlp_reference(*exact.values(), index).sum(), exact.values())
    for name, ours, theirs in zip(tensors, actual, expected, strict=True):
        assert_close(f"{name}.grad", ours, theirs)


@pytest.mark.parametrize("trained", [*NAMES, "nothing"])
def test_any_input_may_be_frozen(trained):
    tensors, index = small()
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
    y_TD = expert_mlp(*tensors.values(), index)
    assert y_TD.requires_grad == (trained in tensors)
    if trained in tensors:
        y_TD.sum().backward()
        assert tensors[trained].grad.any()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_saves_x_h_weights_and_indices_only(backend, triton_device):
    T, K, E = 8, 2, 3
    device = triton_device if backend == "triton" else "cpu"
    tensors = in_dtype({n: t.to(device) for n, t in inputs(T, E, K).items()}, torch.bfloat16)
    index = permute_index(torch.arange(T * K, device=device) % E, E)
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_mlp(*tensors.values(), index, backend=backend)
    for parameter in (tensors["w_gate_up"], tensors["w_down"]):
        assert saved.pop(parameter.data_ptr()) == parameter.nbytes
    indices = sum(saved.pop(t.data_ptr()) for t in index)
    assert indices == T * K * (8 + 8) + 4 * E
    assert saved.pop(tensors["weights"].data_ptr()) == 4 * T * K
    assert sum(saved.values()) == 2 * T * D + 4 * T * K * F


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_torch_compile_traces_one_graph(backend, triton_device):
    def forward(x: Tensor, gate_up: Tensor, down: Tensor, weights: Tensor, index: Any) -> Tensor:
        return expert_mlp(x * 2, gate_up, down, weights, index, backend=backend).square()

    device = triton_device if backend == "triton" else "cpu"
    tensors, index = small(device)
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    cotangent_TD = torch.ones(4, D, device=device)
    actual, expected = (run(f, tensors, index, cotangent_TD) for f in (compiled, forward))
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_custom_ops_keep_torchs_rules(backend, triton_device):
    device = triton_device if backend == "triton" else "cpu"
    tensors, index = small(device)
    ops = torch.ops.joulemoe
    biases = torch.randn(3, 2 * F, device=device), torch.randn(3, D, device=device)
    for variant in ((None, None), biases):
        # Rows of sentinels in h are undefined: these have none.
        arguments = (*tensors.values(), *index, *variant, "geglu", backend)
        torch.library.opcheck(ops.expert_mlp.default, arguments)
        frozen = [t.detach() for t in tensors.values()]
        h_NG = torch.randn(8, 2 * F, device=device)
        arguments = (frozen[0] + 1, *frozen, *index, *variant, h_NG, "geglu", backend)
        torch.library.opcheck(ops.expert_mlp_backward.default, arguments)


def shaped(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


GOOD = ((3, 8), (2, 8, 8), (2, 8, 4), (3, 1))
ENDS = torch.tensor([1, 3], dtype=torch.int32)


@pytest.mark.parametrize(
    ("tensors", "index", "message"),
    [
        (shaped((3, 1, 8), *GOOD[1:]), None, r"got \[\(3, 1, 8\), \(2, 8, 8\), \(2, 8, 4\), \(3, 1\)\]"),
        (shaped(GOOD[0], (8, 8), *GOOD[2:]), None, r"got \[\(3, 8\), \(8, 8\), \(2, 8, 4\), \(3, 1\)\]"),
        (shaped(*GOOD[:2], (8, 4), GOOD[3]), None, r"got \[\(3, 8\), \(2, 8, 8\), \(8, 4\), \(3, 1\)\]"),
        (shaped(*GOOD[:2], (2, 8, 8), GOOD[3]), None, r"needs down \[2, 8, 4\] .* got down \(2, 8, 8\)"),
        (shaped(GOOD[0], (2, 9, 8), *GOOD[2:]), None, r"gate_up \(2, 9, 8\)"),
        (shaped((3, 4), *GOOD[1:]), None, r"x \[T, 8\], got .* x \(3, 4\)"),
        (shaped(*GOOD[:3], (2, 1)), None, r"weights \(2, 1\) must have a row for each of the 3 tokens"),
        (shaped(*GOOD), (torch.arange(2), torch.arange(3), ENDS), r"hold 3 pairs, got \(2,\) and \(3,\)"),
        (shaped(*GOOD), (torch.arange(3),) * 2 + (ENDS.long(),), r"ends must be int32 .*, got torch.int64"),
        (
            shaped(*GOOD),
            (torch.arange(3),) * 2 + (ENDS[:1],),
            r"int32 of shape \[2\], got torch.int32 \(1,\)",
        ),
        ([torch.zeros(3, 8).bfloat16(), *shaped(*GOOD[1:])], None, "x torch.bfloat16, gate_up torch.float32"),
        (shaped(*GOOD, dtype=torch.int32), None, "torch.int32 is not supported by backend='torch'; allowed"),
        (shaped(*GOOD, dtype=torch.bfloat16), None, "weights must be torch.float32 for x of torch.bfloat16"),
    ],
)
def test_what_does_not_fit_is_refused(tensors, index, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(*tensors, index or (torch.arange(3), torch.arange(3), ENDS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "relu"}, "activation='relu' is unknown; allowed: swiglu, geglu, clamped_swiglu"),
        (
            {"biases": (torch.zeros(2, 4), torch.zeros(2, 8))},
            r"of shapes \[\(2, 8\), \(2, 8\)\], got .*\(2, 4\)",
        ),
        ({"biases": (torch.zeros(2, 8).half(), torch.zeros(2, 8))}, "biases must be torch.float32 of shapes"),
        ({"precision": "fp8", "activation": "geglu"}, "precision='fp8' takes swiglu experts without biases"),
    ],
)
def test_variants_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        expert_mlp(*shaped(*GOOD), (torch.arange(3), torch.arange(3), ENDS), **options)


def test_triton_refuses_float64(triton_device):
    tensors, index = small(triton_device, torch.float64)
    with pytest.raises(
        ValueError, match=r"torch\.float64 is not supported by backend='triton'; allowed: torch.f"
    ):
        expert_mlp(*tensors.values(), index, backend="triton")
