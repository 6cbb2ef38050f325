"""Grouped products of a layer's experts, forward and both gradients, beside torch's and one dense product.

python -m benchmarks.bench_grouped_gemm --device cuda --set qwen3-30b --json out.json
python -m benchmarks.bench_grouped_gemm --shape 4096,512,256,64,4 --dtype bf16

`up` is [T*K, H] x [E, 2I, H], `down` is [T*K, I] x [E, H, I]. `moe` and `torch_grouped_mm` have rows in
expert order; `moe_gather` and `torch_gather` take tokens, gathered in the kernel and before it. `matmul` is
the same products as one dense one.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import (
    Mark,
    Samples,
    Step,
    device_name,
    progress,
    require_device,
    stamp,
    time_interleaved_ms,
    write_json,
)
from benchmarks.problem import Problem, make_problem
from benchmarks.roofs import Peak, peak_of
from benchmarks.shapes import SETS, Shape, parse_shape, shapes_of
from benchmarks.verdict import Errors, Verdict, complaints
from moe.kernels.grouped_gemm import grouped_gemm
from moe.kernels.permute_index import permute_index

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Which part of a step's laps a direction is; the laps between run forwards that are not timed.
PARTS = {"forward": 0, "dgrad": 2, "wgrad": 4}

Row = dict[str, Any]


@dataclass(frozen=True)
class Grouped:
    """One grouped product.

    Attributes:
        name: `up` or `down`.
        x: tokens of `up`, rows in expert order of `down`.
        w_EFD: weights.
        grad_NF: gradient of the output.
        index: order, inverse and ends of the pairs.
        top_k: rows a token of `up`; 0 for `down`.
    """

    name: str
    x: Tensor
    w_EFD: Tensor
    grad_NF: Tensor
    index: tuple[Tensor, Tensor, Tensor]
    top_k: int

    @property
    def flops(self) -> int:
        """Of each direction."""
        return 2 * self.grad_NF.numel() * self.x.shape[1]


@dataclass(frozen=True)
class Implementation:
    """A way to compute it.

    Attributes:
        x: what it takes as rows.
        source_N: which of them each row in expert order is.
        product: the output from x and the weights.
    """

    x: Tensor
    source_N: Tensor
    product: Callable[[Tensor, Tensor], Tensor]


def main() -> int:
    """Parse argv, measure shape after shape, print; 1 if our own result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument(
        "--shape", type=parse_shape, action="append", metavar="T,H,I,E,K", help="may be repeated"
    )
    parser.add_argument("--set", choices=SETS, action="append", help="named shapes; may be repeated")
    parser.add_argument("--seconds", type=float, default=3.0, help="to time one product of one shape")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    require_device(args.device)
    dtype = args.dtype or ("bf16" if args.device == "cuda" else "fp32")
    rows: list[Row] = []
    for shape in shapes_of(args.device, args.shape, args.set):
        progress(f"{shape} {dtype} on {device_name(args.device)}")
        try:
            for grouped in products(make_problem(shape, DTYPES[dtype], args.device)):
                rows += bench(shape, grouped, dtype, args.device, seconds=args.seconds)
        except torch.cuda.OutOfMemoryError as error:
            progress(f"{shape} does not fit: {str(error).partition(chr(10))[0]}")
        if args.json:
            write_json(args.json, rows)
    print(as_text(rows))
    return int(any(row["impl"].startswith("moe") and not row["correct"] for row in rows))


def products(problem: Problem) -> Iterator[Grouped]:
    """The two products of a layer's forward."""
    N, K = problem.shape.pairs, problem.shape.K
    index = permute_index(problem.ids_TK.flatten(), problem.shape.E)
    x_TD = problem.x_TD
    h_NG, a_NF, grad_ND = (
        torch.randn(N, columns, dtype=x_TD.dtype, device=x_TD.device)
        for columns in (2 * problem.shape.I, problem.shape.I, problem.shape.H)
    )
    yield Grouped("up", x_TD, problem.w_gate_up_EGD, h_NG, index, top_k=K)
    yield Grouped("down", a_NF, problem.w_down_EDF, grad_ND, index, top_k=0)


def implementations(grouped: Grouped) -> dict[str, Implementation]:
    """Ours and torch's, in expert order and, of `up`, from tokens."""
    order_N, inverse_N, ends_E = grouped.index
    top_k, in_order_N = grouped.top_k, torch.arange(order_N.numel(), device=order_N.device)

    def ours(x: Tensor, w: Tensor) -> Tensor:
        return grouped_gemm(x, w, ends_E)

    def ours_gathering(x: Tensor, w: Tensor) -> Tensor:
        return grouped_gemm(x, w, ends_E, gather=(order_N, inverse_N), top_k=top_k)

    def torchs(x: Tensor, w: Tensor) -> Tensor:
        return F.grouped_mm(x, w.transpose(1, 2), offs=ends_E)

    if not top_k:
        rows_ND = grouped.x
        found = {}
    else:
        tokens_N = order_N // top_k
        rows_ND = grouped.x[tokens_N]
        found = {
            "moe_gather": Implementation(grouped.x, tokens_N, ours_gathering),
            "torch_gather": Implementation(grouped.x, tokens_N, lambda x, w: torchs(x[tokens_N], w)),
        }
    found = {
        "moe": Implementation(rows_ND, in_order_N, ours),
        "torch_grouped_mm": Implementation(rows_ND, in_order_N, torchs),
    } | found
    return {name: way for name, way in found.items() if name.startswith("moe") or hasattr(F, "grouped_mm")}


def bench(shape: Shape, grouped: Grouped, dtype: str, device: str, *, seconds: float) -> list[Row]:
    """Rows of one product, three an implementation."""
    steps: dict[str, Step] = {"matmul": dense_step(grouped)}
    notes: dict[str, str] = {}
    for name, implementation in implementations(grouped).items():
        notes[name] = judged(grouped, implementation)
        if notes[name]:
            progress(f"  {grouped.name} {name}: WRONG: {notes[name]}")
        else:
            steps[name] = step_of(grouped, implementation)
    samples = time_interleaved_ms(steps, budget_s=seconds, device=device)
    peak = peak_of(device_name(device)) if device == "cuda" and dtype == "bf16" else None
    where = stamp(device)
    return [
        {"impl": name, "shape": str(shape), "product": grouped.name, "dtype": dtype, "direction": direction}
        | rates(grouped, samples.get(name), samples["matmul"], direction, peak)
        | {"correct": not notes.get(name), "note": notes.get(name) or None, "stamp": where}
        for name in ("matmul", *notes)
        for direction in PARTS
    ]


def judged(grouped: Grouped, implementation: Implementation) -> str:
    """What is wrong with the output or a gradient; empty if nothing is."""
    x = implementation.x
    leaves = [tensor.detach().requires_grad_() for tensor in (x, grouped.w_EFD)]
    out_NF = implementation.product(*leaves)
    grad_x, grad_w = torch.autograd.grad(out_NF, leaves, grouped.grad_NF)
    dtype = x.dtype
    exact = torch.float64 if dtype == torch.float32 else torch.float32
    verdicts = {name: Verdict(Errors(), Errors()) for name in ("out", "grad_x", "grad_w")}
    sums = {wide: torch.zeros_like(x, dtype=wide) for wide in (exact, dtype)}
    start = 0
    for expert, end in enumerate(grouped.index[2].tolist()):
        rows = slice(start, end)
        source = implementation.source_N[rows]  # a token is at most once among an expert's rows
        pieces = {
            wide: piece(x[source].to(wide), grouped.w_EFD[expert].to(wide), grouped.grad_NF[rows].to(wide))
            for wide in sums
        }
        verdicts["out"].add(out_NF.detach()[rows], pieces[exact][0], pieces[dtype][0])
        verdicts["grad_w"].add(grad_w[expert], pieces[exact][2], pieces[dtype][2])
        for wide, total in sums.items():
            total[source] += pieces[wide][1]
        start = end
    verdicts["grad_x"].add(grad_x, sums[exact], sums[dtype])
    return complaints(verdicts, dtype)


def piece(x_RD: Tensor, w_FD: Tensor, grad_RF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output and gradients of one expert."""
    return x_RD @ w_FD.T, grad_RF @ w_FD, grad_RF.T @ x_RD


def step_of(grouped: Grouped, implementation: Implementation) -> Step:
    """Forward, then each gradient alone, from a graph of its own."""
    x, product, w_EFD, grad_NF = implementation.x, implementation.product, grouped.w_EFD, grouped.grad_NF
    x_leaf, w_leaf = x.detach().requires_grad_(), w_EFD.detach().requires_grad_()

    def step(mark: Mark) -> None:
        product(x, w_EFD)
        mark()
        out_NF = product(x_leaf, w_EFD)
        mark()
        torch.autograd.grad(out_NF, x_leaf, grad_NF)
        mark()
        out_NF = product(x, w_leaf)
        mark()
        torch.autograd.grad(out_NF, w_leaf, grad_NF)
        mark()

    return step


def dense_step(grouped: Grouped) -> Step:
    """The same three products of all rows with one expert's weight."""
    rows, columns = grouped.grad_NF.shape[0], grouped.x.shape[1]
    x_ND = torch.randn(rows, columns, dtype=grouped.x.dtype, device=grouped.x.device)
    w_FD, grad_NF = grouped.w_EFD[0], grouped.grad_NF

    def step(mark: Mark) -> None:
        _ = x_ND @ w_FD.T
        mark()
        mark()
        _ = grad_NF @ w_FD
        mark()
        mark()
        _ = grad_NF.T @ x_ND
        mark()

    return step


def rates(
    grouped: Grouped, samples: Samples | None, products: Samples, direction: str, peak: Peak | None
) -> Row:
    """Median time of a direction and what follows from it."""
    if samples is None:
        return dict.fromkeys(("ms", "tflops", "ratio_to_matmul", "percent_of_peak"))
    ms, products_ms = (
        statistics.median(parts[PARTS[direction]] for parts in laps) for laps in (samples, products)
    )
    tflops = grouped.flops / ms / 1e9
    return {
        "ms": ms,
        "tflops": tflops,
        "ratio_to_matmul": products_ms / ms,
        "percent_of_peak": None if peak is None else 1e14 * tflops / peak.flops_per_s,
    }


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """All rows as a table; the ratio to the dense product is its last column."""
    lines = [
        f"{'T,H,I,E,K':24} {'dtype':5} {'product':7} {'impl':16} {'direction':9} "
        f"{'ms':>9} {'TFLOP/s':>8} ratio"
    ]
    for row in rows:
        head = " ".join(
            f"{row[key]:{width}}"
            for key, width in (("shape", 24), ("dtype", 5), ("product", 7), ("impl", 16), ("direction", 9))
        )
        if row["correct"]:
            lines.append(f"{head} {row['ms']:9.3f} {row['tflops']:8.3f} {row['ratio_to_matmul']:5.2f}")
        else:
            lines.append(f"{head} WRONG, not timed: {row['note']}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
