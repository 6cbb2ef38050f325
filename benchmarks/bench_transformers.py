"""A training step of Hugging Face models: our kernels beside transformers' own implementations of experts.

python -m benchmarks.bench_transformers --json out.json
python -m benchmarks.bench_transformers --family mixtral --tokens 2,512 --dtype bf16 --device cuda

Forward and backward of the whole model, random weights, the same tokens; the implementations take turns. One
whose loss or any gradient differs from eager's in fp32 is an error, not a time. A ratio below 1 means that
ours is faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Mark, Step, progress, require_device, stamp, time_interleaved_ms, write_json
from moe.transformers_backend import NAME, register_with_transformers

IMPLEMENTATIONS = ("eager", "grouped_mm", NAME)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the largest value, between implementations of one model in fp32. In bf16 a rounding in one layer changes
# the choice of experts in the next, so bf16 is checked where one layer is, in the tests.
TOLERANCE = 1e-4

# Shared by the families: experts take most of the step, as in a large model.
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 1024,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        {"intermediate_size": 512, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"head_dim": 64, "moe_intermediate_size": 128, "num_experts": 32, "num_experts_per_tok": 4},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            "intermediate_size": 512,
            "moe_intermediate_size": 128,
            "n_routed_experts": 32,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "q_lora_rank": 128,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "num_mtp_layers": 0,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"head_dim": 64, "intermediate_size": 256, "num_local_experts": 16, "num_experts_per_tok": 4},
    ),
}


class DifferentResultError(Exception):
    """An implementation computes something else than eager; the text says what."""


def main() -> int:
    """Parse argv, measure family after family, print; 1 if results differ."""
    args = _parser().parse_args()
    require_device(args.device)
    register_with_transformers()
    rows = []
    for family in args.family or FAMILIES:
        progress(f"{family}, {args.dtype} on {args.device}")
        try:
            rows.append(bench(family, args.tokens, args.dtype, args.device, seconds=args.seconds))
        except DifferentResultError as error:
            progress(f"  {error}")
            return 1
    for row in rows:
        print(as_text(row))
    if args.json:
        result = {
            "benchmark": "training step of transformers models",
            "rows": rows,
            "stamp": stamp(args.device),
        }
        write_json(args.json, result)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=FAMILIES, action="append", help="may be repeated; default: all")
    parser.add_argument(
        "--tokens", type=_tokens, default=(2, 512), metavar="B,S", help="sequences, tokens of each"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--seconds", type=float, default=20.0, help="to time one family")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    return parser


def _tokens(text: str) -> tuple[int, int]:
    try:
        batch, length = (int(size) for size in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: two integers B,S are needed, e.g. 2,512") from None
    return batch, length


def bench(family: str, tokens: tuple[int, int], dtype: str, device: str, *, seconds: float) -> dict[str, Any]:
    """One family: milliseconds of each implementation, and how ours compares.

    Raises:
        DifferentResultError: an implementation does not compute what eager computes.
    """
    model = make_model(family).to(device)
    tokens_BS = torch.randint(
        SIZES["vocab_size"], tokens, generator=torch.Generator().manual_seed(1), device="cpu"
    ).to(device)
    expected = results(model, "eager", tokens_BS)
    for name in IMPLEMENTATIONS[1:]:
        require_equal(name, results(model, name, tokens_BS), expected)
    model.to(DTYPES[dtype])
    samples = time_interleaved_ms(
        {name: step_of(model, name, tokens_BS) for name in IMPLEMENTATIONS}, budget_s=seconds, device=device
    )
    step_ms = {name: statistics.median(map(sum, times)) for name, times in samples.items()}
    return {
        "family": family,
        "config": SIZES | FAMILIES[family][1],
        "tokens": list(tokens),
        "dtype": dtype,
        "forward_ms": {name: statistics.median(t[0] for t in times) for name, times in samples.items()},
        "step_ms": step_ms,
        "repeats": len(samples[NAME]),
        "ratios": {name: step_ms[NAME] / step_ms[name] for name in IMPLEMENTATIONS[:-1]},
    }


def make_model(family: str) -> Any:
    """A random model in training mode."""
    import transformers

    config_class, sizes = FAMILIES[family]
    config = getattr(transformers, config_class)(**SIZES | sizes)
    auto: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    return auto.from_config(config).train()


def step_of(model: Any, implementation: str, tokens_BS: Tensor) -> Step:
    """Forward and backward, two parts."""

    def step(mark: Mark) -> None:
        model.set_experts_implementation(implementation)
        model.zero_grad()
        loss = model(tokens_BS, labels=tokens_BS, use_cache=False).loss
        mark()
        loss.backward()
        mark()

    return step


def results(model: Any, implementation: str, tokens_BS: Tensor) -> dict[str, Tensor]:
    """The loss and the gradient of every parameter."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    loss = model(tokens_BS, labels=tokens_BS, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters()}


def require_equal(implementation: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raise if a result is not that of eager, within TOLERANCE."""
    for name in expected:
        error = float((found[name] - expected[name]).abs().max() / expected[name].abs().max())
        if not error < TOLERANCE:
            raise DifferentResultError(f"{implementation}: {name} differs from eager's by {error:.3g}")


def as_text(row: Mapping[str, Any]) -> str:
    """One line for a person."""
    times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in row["step_ms"].items())
    ratios = ", ".join(f"{NAME}/{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
    return f"{row['family']} {row['dtype']}: {times}; {ratios}"


if __name__ == "__main__":
    sys.exit(main())
