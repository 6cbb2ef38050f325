"""Forward and backward of the routed experts: our op against a loop over experts.

python -m benchmarks.bench_expert_mlp --shape 2048,192,128,16,2
Shape: T tokens, H model width, I expert hidden, E experts, K top-k. FLOPs: 18 * T*K * H * I (three matrices,
forward and two backward products each).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import require_close, stamp, time_interleaved_ms, write_json
from moe.kernels.expert_mlp import expert_mlp
from moe.kernels.expert_mlp.reference import expert_mlp_reference

# Largest error over largest value, of outputs and gradients: fp32 and bf16 rounding over sums of H terms.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

Op = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    """Parse argv, check, time, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="2048,192,128,16,2", help="T,H,I,E,K")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--seconds", type=float, default=5.0, help="time for all variants together")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args()
    try:
        T, H, I, E, K = (int(size) for size in args.shape.split(","))
    except ValueError:
        parser.error(
            f"--shape {args.shape!r}: five integers T,H,I,E,K are needed, for example 2048,192,128,16,2"
        )
    result = bench(T, H, I, E, K, device=args.device, dtype=getattr(torch, args.dtype), seconds=args.seconds)
    print(json.dumps(result, indent=1))
    if args.json:
        write_json(args.json, result)


def bench(
    T: int,
    H: int,
    I: int,
    E: int,
    K: int,
    *,
    device: str,
    dtype: torch.dtype,
    seconds: float,
) -> dict[str, object]:
    """Measure one shape; every variant is checked against the fp32 reference first."""
    generator = torch.Generator().manual_seed(0)
    x_RD, w_gate_up, w_down, grad_RD = (
        (torch.randn(*shape, generator=generator) * scale).to(device, dtype)
        for shape, scale in (
            ((T * K, H), 1.0),
            ((E, 2 * I, H), H**-0.5),
            ((E, H, I), I**-0.5),
            ((T * K, H), 1.0),
        )
    )
    # Natural routing is uneven: random owners, not equal shares.
    owners = torch.randint(0, E, (T * K,), generator=generator).bincount(minlength=E)
    ends = owners.cumsum(0).to(device, torch.int32)
    leaves = [t.requires_grad_() for t in (x_RD, w_gate_up, w_down)]

    def run(op: Op) -> list[Tensor]:
        y_RD = op(*leaves, ends)
        return [y_RD.detach(), *torch.autograd.grad(y_RD, leaves, grad_RD)]

    wide = [t.detach().float().requires_grad_() for t in leaves]
    y_RD = expert_mlp_reference(*wide, ends)
    expected = [y_RD.detach(), *torch.autograd.grad(y_RD, wide, grad_RD.float())]
    variants: dict[str, Op] = {"expert_mlp": expert_mlp, "loop_over_experts": expert_mlp_reference}
    for name, op in variants.items():
        for part, found, right in zip(("y", "dx", "dw_gate_up", "dw_down"), run(op), expected, strict=True):
            require_close(f"{name} {part}", found, right, tolerance=TOLERANCES[dtype])
    times = time_interleaved_ms(
        {name: lambda op=op: run(op) for name, op in variants.items()}, budget_s=seconds, device=device
    )
    flops = 18 * T * K * H * I
    return {
        "benchmark": "expert_mlp forward+backward",
        "shape": {"T": T, "H": H, "I": I, "E": E, "K": K},
        "dtype": str(dtype).removeprefix("torch."),
        "variants": {n: {**t, "gflop_per_s": flops / t["median_ms"] / 1e6} for n, t in times.items()},
        "speedup_over_loop": times["loop_over_experts"]["median_ms"] / times["expert_mlp"]["median_ms"],
        "stamp": stamp(device),
    }


if __name__ == "__main__":
    main()
