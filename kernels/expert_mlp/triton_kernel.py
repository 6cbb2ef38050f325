"""SwiGLU experts as Triton kernels: tokens are gathered while they are loaded, the activation is an epilogue.

Shapes: T tokens, K top-k, N = T*K rows in expert order, D model, F expert hidden, G = 2F, e experts.

Forward                                            Backward, from dO [T, D]
1. up        H, A = x[order // K] @ W1^T, swiglu   1. dH       dA = dO[order // K] @ W2; dH, A', dS
2. gemm      Y = A @ W2^T                          2. wgrad    dW2 = dO[order // K]^T @ A'
3. sum_rows  y[t] = sum_k s[t, k] Y[inverse]       3. gemm     dX~ = dH @ W1
                                                   4. wgrad    dW1 = dH^T @ x[order // K]
                                                   5. sum_rows dx[t] = sum_k dX~[inverse]

H is saved, A and Y are not: the backward makes A again from H, and dS = <dA, A> needs no Y (SonicMoE, arXiv
2512.14080; the equations are those of torch_backend.py). Everything is computed in fp32 from bf16 operands.
"""
# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: PLR0917
# Triton has no types: its kernels take pointers and blocks that exist on the device only.

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe.kernels.combine.triton_kernel import sum_rows
from moe.kernels.expert_mlp.bias_kernel import launch_bias_products, launch_expert_sums
from moe.kernels.expert_mlp.triton_activation import activated, activation_gradients
from moe.kernels.expert_mlp.variant import PLAIN, Variant
from moe.kernels.grouped_gemm.tiles import Sizes, Tile, launch_options, tile_for
from moe.kernels.grouped_gemm.triton_kernel import (
    TileMaps,
    eighths,
    gathered,
    launch_grouped_gemm,
    launch_grouped_wgrad,
    row_products,
    tile_rows,
)

Index = tuple[Tensor, Tensor, Tensor]

PAIRS_BLOCK = 256
GELU_COLUMNS = 128  # of a tile at the most: with 256, the error function spills 304 bytes on sm_90


@triton.jit
def up_kernel(
    p_x,
    p_w,
    p_bias,
    p_h,
    p_a,
    p_order,
    p_ends,
    p_map,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[r] = x[token of r] @ w[expert]^T and a[r] = act(gate, up). Grid as in grouped_gemm_kernel.

    A tile has BLOCK_N / 2 columns of gate and the same of up, one beside the other: the two are then in the
    same thread's registers.
    """
    HALF: tl.constexpr = BLOCK_N // 2
    tiles_F: tl.constexpr = (F + HALF - 1) // HALF
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    first_F = tl.program_id(0) % tiles_F * HALF
    o_N = tl.arange(0, BLOCK_N)
    o_G = first_F + o_N // 2 + o_N % 2 * F  # rows of the weight: gate's, then up's
    m_G = first_F + o_N // 2 < F
    b_h = row_products(
        p_x,
        p_w + expert * (2 * F * D),
        gathered(p_order, o_M, m_M, TOP_K),
        m_M,
        o_G,
        m_G,
        D,
        1,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    if p_bias is not None:
        b_h += tl.load(p_bias + expert * (2 * F) + o_G, mask=m_G, other=0.0).to(tl.float32)[None, :]
    b_gate, b_up = tl.split(tl.reshape(b_h.to(p_h.dtype.element_ty), (BLOCK_M, HALF, 2)))
    o_F = first_F + tl.arange(0, HALF)
    m_MF = m_M[:, None] & (o_F < F)[None, :]
    p_h_MF = p_h + o_M[:, None] * (2 * F) + o_F[None, :]
    tl.store(p_h_MF, b_gate, mask=m_MF)
    tl.store(p_h_MF + F, b_up, mask=m_MF)
    # From the rounded values, those that the backward will have.
    b_a = activated(b_gate.to(tl.float32), b_up.to(tl.float32), ACTIVATION)
    tl.store(p_a + o_M[:, None] * F + o_F[None, :], b_a.to(p_a.dtype.element_ty), mask=m_MF)


@triton.jit
def grad_h_kernel(
    p_grad,
    p_w,
    p_h,
    p_weights,
    p_grad_h,
    p_scaled_a,
    p_partials,
    p_order,
    p_ends,
    p_map,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    F: tl.constexpr,
    PARTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dH, A' = s * A, and each column tile's part of dS, [N, PARTS]. Grid as in grouped_gemm_kernel."""
    tiles_F: tl.constexpr = (F + BLOCK_N - 1) // BLOCK_N
    expert, o_M, m_M = tile_rows(p_ends, p_map, tl.program_id(0) // tiles_F, BLOCK_M)
    if expert < 0:
        return
    i_F = tl.program_id(0) % tiles_F
    o_F = i_F * BLOCK_N + tl.arange(0, BLOCK_N)
    o_pairs = tl.load(p_order + o_M, mask=m_M, other=0)
    b_grad_a = row_products(
        p_grad,
        p_w + expert * (D * F),
        o_pairs // TOP_K,
        m_M,
        o_F,
        o_F < F,
        1,
        F,
        D,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    b_weights = tl.load(p_weights + o_pairs, mask=m_M, other=0.0)
    # An eighth at a time: gate, up and what comes of them do not fit in registers beside a whole tile. By
    # quarters, sm_90 takes 133 registers, and with more than 128 no two tiles share a processor.
    EIGHTH: tl.constexpr = BLOCK_N // 8
    b_eighths = eighths(b_grad_a, BLOCK_M, BLOCK_N)
    pointers = (p_h, p_grad_h, p_scaled_a)
    rows = (b_weights, o_M, m_M)
    b_part = tl.zeros((BLOCK_M,), tl.float32)
    for i in tl.static_range(8):
        first_F = i_F * BLOCK_N + i * EIGHTH
        b_part += _grad_h_columns(b_eighths[i], pointers, rows, first_F, F, ACTIVATION, EIGHTH)
    tl.store(p_partials + o_M * PARTS + i_F, b_part, mask=m_M)


@triton.jit
def _grad_h_columns(
    b_grad_a, pointers, rows, first_F, F: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    """Stores these columns of dH and A', returns their sum of dA * A."""
    p_h, p_grad_h, p_scaled_a = pointers
    b_weights, o_M, m_M = rows
    o_F = first_F + tl.arange(0, BLOCK)
    m_MF = m_M[:, None] & (o_F < F)[None, :]
    o_MG = o_M[:, None] * (2 * F) + o_F[None, :]
    b_gate = tl.load(p_h + o_MG, mask=m_MF, other=0.0).to(tl.float32)
    b_up = tl.load(p_h + o_MG + F, mask=m_MF, other=0.0).to(tl.float32)
    b_a, b_by_gate, b_by_up = activation_gradients(b_gate, b_up, ACTIVATION)
    p_a_MF = p_scaled_a + o_M[:, None] * F + o_F[None, :]
    tl.store(p_a_MF, (b_a * b_weights[:, None]).to(p_scaled_a.dtype.element_ty), mask=m_MF)
    b_part = tl.sum(b_grad_a * b_a, axis=1)
    b_grad_a *= b_weights[:, None]
    tl.store(p_grad_h + o_MG, (b_grad_a * b_by_gate).to(p_grad_h.dtype.element_ty), mask=m_MF)
    tl.store(p_grad_h + o_MG + F, (b_grad_a * b_by_up).to(p_grad_h.dtype.element_ty), mask=m_MF)
    return b_part


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def sum_partials_kernel(
    p_partials, p_inverse, p_ends, p_out, num_pairs, num_experts, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[n] = sum of the parts of pair n's row; zero for a pair of no expert."""
    o_N = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_rows = tl.load(p_inverse + o_N, mask=o_N < num_pairs, other=0)
    m_rows = (o_N < num_pairs) & (o_rows < tl.load(p_ends + num_experts - 1))
    b_sum = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        b_sum += tl.load(p_partials + o_rows * PARTS + part, mask=m_rows, other=0.0)
    tl.store(p_out + o_N, b_sum, mask=o_N < num_pairs)


def expert_mlp_fwd(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    w_down_eDF: Tensor,
    weights_TK: Tensor,
    index: Index,
    *,
    variant: Variant = PLAIN,
) -> tuple[Tensor, Tensor]:
    """y_TD and h_NG; contiguous inputs that `expert_mlp` has checked."""
    order_N, inverse_N, ends_e = index
    maps = TileMaps(ends_e, order_N.numel())
    h_NG, a_NF = launch_up(x_TD, w_gate_up_eGD, order_N, maps, weights_TK.shape[1], variant=variant)
    bias_eD = variant.biases[1] if variant.biases else None
    y_ND = launch_grouped_gemm(a_NF, w_down_eDF, maps, w_is_nk=True, bias=bias_eD)
    return sum_rows(y_ND, weights_TK, inverse_N, weights_TK.shape[1], ends_e=ends_e), h_NG


def expert_mlp_bwd(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    index: Index,
    h_NG: Tensor,
    *,
    variant: Variant = PLAIN,
    main_grads: tuple[Tensor, Tensor] | tuple[None, None] = (None, None),
) -> tuple[Tensor, ...]:
    """Gradients of the forward's first four arguments, `inputs`, then of the biases; all contiguous.

    Those of the experts' weights are `main_grads`, if given, with the gradients added to them.
    """
    x_TD, w_gate_up_eGD, _, weights_TK = inputs
    order_N, inverse_N, ends_e = index
    top_k = weights_TK.shape[1]
    maps = TileMaps(ends_e, order_N.numel())
    grad_h_NG, scaled_a_NF, partials_NP = launch_grad_h(grad_TD, inputs, order_N, h_NG, maps, variant=variant)
    grad_weights_TK = sum_partials(partials_NP, inverse_N, ends_e).view_as(weights_TK)
    main_gate_up_eGD, main_down_eDF = main_grads
    grad_down_eDF = launch_grouped_wgrad(
        grad_TD, scaled_a_NF, maps, order_left_R=order_N, top_k=top_k, accumulate_into=main_down_eDF
    )
    del scaled_a_NF, partials_NP  # before the next large one
    grad_gate_up_eGD = launch_grouped_wgrad(
        grad_h_NG, x_TD, maps, order_right_R=order_N, top_k=top_k, accumulate_into=main_gate_up_eGD
    )
    grad_x_ND = launch_grouped_gemm(grad_h_NG, w_gate_up_eGD, maps, w_is_nk=False)
    grad_x_TD = sum_rows(grad_x_ND, None, inverse_N, top_k, ends_e=ends_e)
    grads = (grad_x_TD, grad_gate_up_eGD, grad_down_eDF, grad_weights_TK)
    if variant.biases is None:
        return grads
    grad_bias_eG = launch_expert_sums(grad_h_NG, maps)
    grad_bias_eD = launch_expert_sums(grad_TD, maps, order_R=order_N, weights=weights_TK, top_k=top_k)
    return *grads, grad_bias_eG, grad_bias_eD


def launch_up(
    x_TD: Tensor,
    w_gate_up_eGD: Tensor,
    order_N: Tensor,
    maps: TileMaps,
    top_k: int,
    *,
    variant: Variant = PLAIN,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """h_NG and a_NF; by default with the tile for these sizes."""
    (experts, G, D), F = w_gate_up_eGD.shape, w_gate_up_eGD.shape[1] // 2
    h_NG, a_NF = x_TD.new_empty(maps.num_rows, G), x_TD.new_empty(maps.num_rows, F)
    if h_NG.numel():
        tile = tile or up_tile(Sizes(maps.num_rows, experts, G, D), x_TD, variant.activation)
        map_P2 = maps.of(tile.block_m)
        grid = (map_P2.shape[0] * triton.cdiv(F, tile.block_n // 2),)
        bias_eG = variant.biases[0] if variant.biases else None
        tensors = (x_TD, w_gate_up_eGD, bias_eG, h_NG, a_NF, order_N, maps.ends_e, map_P2)
        with torch.cuda.device_of(x_TD):
            up_kernel[grid](*tensors, top_k, D, F, variant.activation, **launch_options(tile))
    return h_NG, a_NF


def up_tile(sizes: Sizes, like: Tensor, activation: str) -> Tile:
    """The tile of up_kernel; arguments as of `tile_for`."""
    tile = tile_for("up", sizes, like)
    return replace(tile, block_n=min(tile.block_n, GELU_COLUMNS)) if activation == "geglu" else tile


def launch_grad_h(
    grad_TD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    order_N: Tensor,
    h_NG: Tensor,
    maps: TileMaps,
    *,
    variant: Variant = PLAIN,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Make dH [N, G], A' [N, F], and dS in parts [N, P]: one a tile of columns, and one for a bias.

    By default with the tile for these sizes.
    """
    _, _, w_down_eDF, weights_TK = inputs
    (experts, D, F), top_k = w_down_eDF.shape, weights_TK.shape[1]
    tile = tile or tile_for("grad_h", Sizes(maps.num_rows, experts, F, D), grad_TD)
    grad_h_NG, scaled_a_NF = torch.empty_like(h_NG), h_NG.new_empty(maps.num_rows, F)
    tiles_F = triton.cdiv(F, tile.block_n)
    parts = tiles_F + (variant.biases is not None)
    partials_NP = weights_TK.new_empty(maps.num_rows, parts)
    if h_NG.numel():
        map_P2 = maps.of(tile.block_m)
        outputs = (grad_h_NG, scaled_a_NF, partials_NP)
        tensors = (grad_TD, w_down_eDF, h_NG, weights_TK, *outputs, order_N, maps.ends_e, map_P2)
        options = launch_options(tile) | {"ACTIVATION": variant.activation}
        with torch.cuda.device_of(grad_TD):
            grad_h_kernel[(map_P2.shape[0] * tiles_F,)](*tensors, top_k, D, F, parts, **options)
    if variant.biases is not None:
        _, bias_eD = variant.biases
        launch_bias_products(
            grad_TD, bias_eD, maps, order_R=order_N, top_k=top_k, out_R=partials_NP[:, tiles_F]
        )
    return grad_h_NG, scaled_a_NF, partials_NP


def sum_partials(partials_NP: Tensor, inverse_N: Tensor, ends_e: Tensor) -> Tensor:
    """Gradient of each pair's weight, [N]."""
    num_pairs, parts = partials_NP.shape
    grad_N = partials_NP.new_empty(num_pairs)
    if num_pairs:
        grid = (triton.cdiv(num_pairs, PAIRS_BLOCK),)
        tensors = (partials_NP, inverse_N, ends_e, grad_N)
        with torch.cuda.device_of(partials_NP):
            sum_partials_kernel[grid](*tensors, num_pairs, ends_e.numel(), parts, PAIRS_BLOCK)
    return grad_N
