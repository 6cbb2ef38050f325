"""The router: from logits to expert ids, weights and counts, and back, beside the same in plain torch.

python -m benchmarks.bench_topk_route --device cuda --json out.json
python -m benchmarks.bench_topk_route --shape 4096,64,4 --mode sigmoid

On a GPU, `us` is what Python's launches make of it and `graph_us` what its kernels take from a CUDA graph.
Modes: softmax (over the chosen K), sigmoid (renormalised), deepseek-v3 (sigmoid, 4 of 8 groups).
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import (
    Mark,
    Samples,
    Step,
    device_name,
    graphed,
    progress,
    require_device,
    stamp,
    time_interleaved_ms,
    whole,
    write_json,
)
from benchmarks.roofs import peak_of
from moe.kernels.topk_route import topk_route

SHAPES = {
    "cuda": ((16384, 128, 8), (16384, 256, 8), (16384, 512, 10)),
    "cpu": ((4096, 64, 4), (4096, 256, 8)),
}
MODES: dict[str, dict[str, Any]] = {
    "softmax": {"renormalize": True},
    "sigmoid": {"score": "sigmoid", "renormalize": True},
    "deepseek-v3": {
        "score": "sigmoid",
        "renormalize": True,
        "scale": 2.5,
        "num_groups": 8,
        "top_groups": 4,
    },
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Sums of two sigmoids of a group may agree to the last bit but one, and then groups may change places.
MOST_FLIPPED = 1e-3
TOLERANCE = 1e-5

Route = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
Row = dict[str, Any]


def main() -> int:
    """Parse argv, measure every shape in every mode, print; 1 if our own result is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the logits; default: fp32")
    parser.add_argument("--shape", type=parse_shape, action="append", metavar="T,E,K", help="may be repeated")
    parser.add_argument("--mode", choices=MODES, action="append", help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=2.0, help="to time one shape in one mode")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args()
    require_device(args.device)
    rows: list[Row] = []
    for shape in args.shape or SHAPES[args.device]:
        for mode in args.mode or MODES:
            if mode == "deepseek-v3" and (shape[1] % 16 or 2 * shape[2] > shape[1]):
                progress(f"{shape} has no 8 groups of at least 2 experts and K in 4 of them: no {mode}")
                continue
            progress(f"{shape} {mode} {args.dtype} on {device_name(args.device)}")
            rows += bench(shape, mode, args.dtype, args.device, seconds=args.seconds)
            if args.json:
                write_json(args.json, rows)
    print(as_text(rows))
    return int(any(row["impl"] == "moe" and not row["correct"] for row in rows))


def parse_shape(text: str) -> tuple[int, int, int]:
    """`T,E,K`."""
    sizes = text.split(",")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is not three positive integers T,E,K, as in 16384,128,8")
    T, E, K = map(int, sizes)
    if K > E:
        raise argparse.ArgumentTypeError(f"{text!r}: a token cannot have K={K} of E={E} experts")
    return T, E, K


def bench(shape: tuple[int, int, int], mode: str, dtype: str, device: str, *, seconds: float) -> list[Row]:
    """Rows of one shape in one mode, three an implementation."""
    T, E, K = shape
    options = MODES[mode]
    logits_TE = distinct_logits(T, E, DTYPES[dtype], device).requires_grad_()
    grad_TK = torch.randn(T, K, generator=torch.Generator(device).manual_seed(1), device=device)
    routes: dict[str, Route] = {
        "moe": lambda logits: topk_route(logits, K, **options),
        "torch": lambda logits: plain_route(logits, K, **options),
    }
    notes = {name: complaint(route, logits_TE, grad_TK, options) for name, route in routes.items()}
    right = {name: route for name, route in routes.items() if not notes[name]}
    steps = {name: route_step(route, logits_TE, grad_TK) for name, route in right.items()}
    samples = time_interleaved_ms(steps, budget_s=seconds, device=device) if steps else {}
    graphs = graph_samples(right, logits_TE, grad_TK, seconds=seconds) if device == "cuda" and right else {}
    least_us = least_forward_us(shape, logits_TE.element_size(), device)
    where = stamp(device)
    return [
        {"impl": name, "shape": f"{T},{E},{K}", "mode": mode, "dtype": dtype, "direction": direction}
        | {
            "us": median_us(samples.get(name), *parts),
            "graph_us": median_us(graphs.get((name, direction)), 0),
            "least_us": least_us if direction == "forward" else None,
            "correct": not notes[name],
            "note": notes[name] or None,
            "stamp": where,
        }
        for name in routes
        for direction, parts in {"forward": (0,), "backward": (1,), "forward+backward": (0, 1)}.items()
    ]


def distinct_logits(T: int, E: int, dtype: torch.dtype, device: str) -> Tensor:
    """Each row the same E distinct numbers of [-4, 4], exact in bf16, in its own order: no ties to break."""
    order_TE = torch.rand(T, E, generator=torch.Generator(device).manual_seed(0), device=device).argsort(1)
    power = 1 << (E - 1).bit_length()
    return ((order_TE - E // 2).double() * (8 / power)).to(dtype)


def plain_route(
    logits_TE: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """As model code has it: scores of all, the best groups, top-k, gather, renormalise, counts."""
    logits_TE = logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))
    scores_TE = logits_TE.softmax(dim=1) if score == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE
    if num_groups > 1:
        by_group = scores_TE.view(scores_TE.shape[0], num_groups, -1)
        best_groups = by_group.topk(2, dim=2).values.sum(dim=2).topk(top_groups, dim=1).indices
        kept = torch.zeros_like(by_group[:, :, 0]).scatter_(1, best_groups, 1.0)
        choice_TE = by_group.masked_fill(kept.unsqueeze(2) == 0, float("-inf")).flatten(1)
    ids_TK = choice_TE.topk(top_k, dim=1).indices
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalize:
        weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True)
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    counts_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
    return ids_TK, weights_TK * scale, counts_E


def complaint(route: Route, logits_TE: Tensor, grad_TK: Tensor, options: dict[str, Any]) -> str:
    """What is wrong with a router, compared with plain torch in float64; empty if nothing is."""
    wide_TE = logits_TE.detach().double().requires_grad_()
    right_ids, right_weights, right_counts = plain_route(wide_TE, grad_TK.shape[1], **options)
    (right_grad,) = torch.autograd.grad(right_weights, wide_TE, grad_TK.double())
    ids, weights, counts = route(logits_TE)
    (grad,) = torch.autograd.grad(weights, logits_TE, grad_TK)
    same_T = (ids == right_ids).all(dim=1)
    flipped = 1 - float(same_T.double().mean())
    if flipped > MOST_FLIPPED:
        return f"{flipped:.2%} of the tokens have other experts"
    if not int((counts - right_counts).abs().sum()) <= 2 * flipped * ids.numel():
        return "the counts are not those of the ids"
    # A gradient is given back in the dtype of the logits.
    for name, found, right, rounding in (
        ("weights", weights, right_weights, 0.0),
        ("grad_logits", grad, right_grad, torch.finfo(grad.dtype).eps),
    ):
        error = float((found.detach() - right.detach())[same_T].abs().max() / right.detach().abs().max())
        if not error <= TOLERANCE + rounding:
            return f"{name} err by {error:.3g} of the largest"
    return ""


def route_step(route: Route, logits_TE: Tensor, grad_TK: Tensor) -> Step:
    """Forward and backward, two parts."""

    def step(mark: Mark) -> None:
        _, weights_TK, _ = route(logits_TE)
        mark()
        torch.autograd.grad(weights_TK, logits_TE, grad_TK)
        mark()

    return step


def graph_samples(
    routes: Mapping[str, Route], logits_TE: Tensor, grad_TK: Tensor, *, seconds: float
) -> dict[tuple[str, str], Samples]:
    """Times of the kernels alone, by implementation and direction; a backward cannot be captured alone."""
    steps: dict[tuple[str, str], Step] = {}
    for name, route in routes.items():
        both = partial(route_step(route, logits_TE, grad_TK), _no_mark)
        steps[name, "forward"] = whole(graphed(partial(route, logits_TE)))
        steps[name, "forward+backward"] = whole(graphed(both))
    return time_interleaved_ms(steps, budget_s=seconds, device="cuda")


def _no_mark() -> None:
    """Nothing is timed inside a graph."""


def median_us(samples: Samples | None, *parts: int) -> float | None:
    """Median microseconds of these parts together; None if nothing was timed."""
    if samples is None:
        return None
    return 1e3 * statistics.median(sum(lap[part] for part in parts) for lap in samples)


def least_forward_us(shape: tuple[int, int, int], logit_bytes: int, device: str) -> float | None:
    """Time to read the logits and write ids, weights and counts once, at the data sheet's bandwidth."""
    T, E, K = shape
    peak = peak_of(device_name(device)) if device == "cuda" else None
    return None if peak is None else 1e6 * (T * E * logit_bytes + T * K * 12 + E * 8) / peak.bytes_per_s


def as_text(rows: Sequence[Row]) -> str:
    """All rows as a table, then how many times as fast as torch ours is."""
    lines = [f"{'T,E,K':14} {'mode':12} {'dtype':5} {'impl':6} {'direction':17} {'us':>10} {'graph us':>10}"]
    for row in rows:
        head = f"{row['shape']:14} {row['mode']:12} {row['dtype']:5} {row['impl']:6} {row['direction']:17}"
        cells = (f"{'-':>10}" if row[key] is None else f"{row[key]:10.1f}" for key in ("us", "graph_us"))
        lines.append(f"{head} {' '.join(cells)}" if row["correct"] else f"{head} WRONG: {row['note']}")
    lines.append("")
    timed = {
        (row["shape"], row["mode"], row["direction"], row["impl"]): row["graph_us"] or row["us"]
        for row in rows
        if row["us"]
    }
    for (shape, mode, direction, impl), us in timed.items():
        if impl == "moe" and (torch_us := timed.get((shape, mode, direction, "torch"))):
            lines.append(f"{shape} {mode} {direction}: {torch_us / us:.2f}x torch")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
