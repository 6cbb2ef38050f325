"""The three benchmarks as commands: their rows, what they refuse, and that nothing wrong is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped_gemm, bench_moe_layer, bench_topk_route, harness, layer_rows
from benchmarks.harness import time_interleaved_ms
from benchmarks.roofs import PEAKS, roof_ms
from benchmarks.shapes import DIRECTIONS, SETS
from benchmarks.variants import Variant, ours
from moe.kernels.topk_route.reference import topk_route_reference

KEYS = {"impl", "shape", "dtype", "direction", "ms", "tflops", "ratio_to_matmul"} | {
    "saved_bytes",
    "correct",
    "joules",
    "energy_source",
}
SMALL = ("--seconds", "0.01", "--shape", "48,32,16,4,2")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Runs a benchmark's main with arguments; its exit code and rows."""

    def run(module, *arguments: str) -> tuple[int, list[dict]]:
        path = tmp_path / "out.json"
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments, "--json", str(path)])
        return module.main(), json.loads(path.read_text())

    return run


@pytest.mark.parametrize(("dtype", "memory"), [("fp32", "kept"), ("bf16", "glibc")])
def test_layer_rows(call, capsys, monkeypatch, dtype, memory):
    kept = []
    monkeypatch.setattr(harness, "keep_freed_memory", lambda: kept.append(1))
    options = ("--device", "cpu", "--dtype", dtype, "--impl", "hf_grouped_mm")
    code, rows = call(bench_moe_layer, *options, *SMALL, "--freed-memory", memory)
    assert code == 0
    assert {row["stamp"]["freed_memory"] for row in rows} == {memory}
    assert bool(kept) == (memory == "kept")
    assert all(set(row) >= KEYS for row in rows)
    assert [(row["impl"], row["direction"]) for row in rows] == [
        (impl, direction) for impl in ("matmul", "moe", "hf_grouped_mm") for direction in DIRECTIONS
    ]
    assert {(row["shape"], row["dtype"], row["correct"]) for row in rows} == {("48,32,16,4,2", dtype, True)}
    for row in rows:
        passes = {"forward": 6, "backward": 12, "forward+backward": 18}[row["direction"]]
        assert row["tflops"] == pytest.approx(passes * 48 * 2 * 32 * 16 / row["ms"] / 1e9)
        assert row["joules"] is None or row["energy_source"] != "none"
    assert [row["ratio_to_matmul"] for row in rows[:3]] == [1.0, 1.0, 1.0]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"48,32,16,4,2 {dtype} forward+backward: ratio_to_matmul ")
    assert last.endswith("x hf_grouped_mm")


def test_the_roof_of_a_known_gpu():
    shape, peak = SETS["qwen3-30b"][0], PEAKS[0]
    laps = [(2 * roof_ms(shape, "forward", peak), 4 * roof_ms(shape, "backward", peak))] * 3
    rows = [
        layer_rows.UNMEASURED
        | {"impl": "moe", "shape": str(shape), "dtype": "bf16", "direction": way, "correct": True}
        | layer_rows.rates(shape, way, laps, products=[(1.0, 1.0)], peak=peak)
        for way in DIRECTIONS
    ]
    assert [row["percent_of_roof"] for row in rows[:2]] == pytest.approx([50, 25])
    assert 25 < rows[2]["percent_of_roof"] < 50
    assert f"at the peaks of the {peak.source}\n" in layer_rows.as_text(rows)


def test_what_is_wrong_is_reported_and_not_timed(call, capsys, monkeypatch):
    timed = []

    def wrong(problem) -> Variant:
        right = ours(problem)

        def forward(x, weights):
            timed.append(1)
            return 1.1 * right.forward(x, weights)

        return Variant(right.parameters, forward)

    def broken(_problem) -> Variant:
        raise TypeError("apply() takes 5 positional arguments\nand more")

    for name, build in (("hf_eager", wrong), ("liger", broken)):
        monkeypatch.setitem(bench_moe_layer.IMPLEMENTATIONS, name, build)
    code, rows = call(bench_moe_layer, *SMALL, "--impl", "hf_eager", "--impl", "liger")
    assert code == 0  # ours is right
    assert len(timed) == 1
    notes = {row["impl"]: row["note"] for row in rows if not row["correct"]}
    assert notes["hf_eager"].startswith("y errs by ")
    assert notes["liger"] == "TypeError: apply() takes 5 positional arguments"
    assert {row["ms"] for row in rows if row["impl"] in notes} == {None}
    assert "hf_eager" not in capsys.readouterr().out.splitlines()[-1]


def test_our_own_wrong_result_is_an_exit_code(call, monkeypatch):
    def wrong(problem) -> Variant:
        right = ours(problem)
        return Variant(right.parameters, lambda x, weights: right.forward(x, weights.detach() + 0 * weights))

    monkeypatch.setitem(bench_moe_layer.IMPLEMENTATIONS, "moe", wrong)
    code, rows = call(bench_moe_layer, *SMALL, "--impl", "hf_grouped_mm")
    assert code == 1
    (note,) = {row["note"] for row in rows if row["impl"] == "moe"}
    assert note.startswith("grad_weights errs by ")


def test_router_rows(call, capsys):
    code, rows = call(bench_topk_route, "--shape", "32,32,4", "--seconds", "0.01")
    assert code == 0
    assert {(row["impl"], row["mode"]) for row in rows} == {
        (impl, mode) for impl in ("moe", "torch") for mode in bench_topk_route.MODES
    }
    assert all(row["correct"] and row["us"] > 0 and row["graph_us"] is None for row in rows)
    assert capsys.readouterr().out.splitlines()[-1].startswith("32,32,4 deepseek-v3 forward+backward: ")


@pytest.mark.parametrize("mode", bench_topk_route.MODES)
def test_the_plain_router_is_the_reference(mode):
    options = {"score": "softmax", "score_before_topk": True, "scale": 1.0} | bench_topk_route.MODES[mode]
    logits_TE = bench_topk_route.distinct_logits(24, 32, torch.float64, "cpu")
    ids_TK, weights_TK, counts_E = bench_topk_route.plain_route(logits_TE, 4, **bench_topk_route.MODES[mode])
    right_ids, right_weights, right_counts = topk_route_reference(logits_TE, 4, **options)
    assert torch.equal(ids_TK, right_ids)
    assert torch.equal(counts_E, right_counts)
    torch.testing.assert_close(weights_TK, right_weights, rtol=1e-12, atol=0)


def test_a_wrong_router_is_found():
    logits_TE = bench_topk_route.distinct_logits(64, 32, torch.float32, "cpu").requires_grad_()
    grad_TK = torch.randn(64, 4)
    options = bench_topk_route.MODES["softmax"]

    def route(change):
        return lambda logits: change(*bench_topk_route.plain_route(logits, 4, **options))

    changes = {
        "": lambda ids, weights, counts: (ids, weights, counts),
        "100.00% of the tokens": lambda ids, weights, counts: (ids.flip(1), weights, counts),
        "the counts are not": lambda ids, weights, counts: (ids, weights, counts.roll(1)),
        "weights err by": lambda ids, weights, counts: (ids, weights * 1.001, counts),
        "grad_logits err by": lambda ids, weights, counts: (ids, weights.detach() + 0 * weights, counts),
    }
    for text, change in changes.items():
        found = bench_topk_route.complaint(route(change), logits_TE, grad_TK, options)
        assert found.startswith(text), f"{found!r} is not {text!r}"
        assert bool(found) == bool(text)


def test_grouped_rows(call):
    code, rows = call(bench_grouped_gemm, *SMALL)
    assert code == 0
    assert all(row["correct"] for row in rows)
    ways = {product: {row["impl"] for row in rows if row["product"] == product} for product in ("up", "down")}
    assert ways["down"] == {"matmul", "moe", "torch_grouped_mm"}
    assert ways["up"] == ways["down"] | {"moe_gather", "torch_gather"}
    (up,) = (row for row in rows if (row["product"], row["impl"], row["direction"]) == ("up", "moe", "wgrad"))
    assert up["tflops"] == pytest.approx(2 * 96 * 32 * 32 / up["ms"] / 1e9)


def test_a_wrong_grouped_product_is_found(call, monkeypatch):
    right = bench_grouped_gemm.grouped_gemm

    def wrong(*tensors, **options):
        return 1.01 * right(*tensors, **options)

    monkeypatch.setattr(bench_grouped_gemm, "grouped_gemm", wrong)
    code, rows = call(bench_grouped_gemm, *SMALL)
    assert code == 1
    wrong = {row["impl"] for row in rows if not row["correct"]}
    assert wrong == {"moe", "moe_gather"}
    assert {row["ms"] for row in rows if row["impl"] in wrong} == {None}


@pytest.mark.parametrize("module", [bench_moe_layer, bench_grouped_gemm, bench_topk_route])
def test_a_bad_shape_and_a_missing_gpu_are_said(call, capsys, monkeypatch, module):
    with pytest.raises(SystemExit, match="2"):
        call(module, "--shape", "12,x")
    assert "'12,x' is not" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        call(module, "--device", "cuda")
    assert "no GPU: torch" in capsys.readouterr().err


def test_steps_take_turns_and_parts_are_apart():
    order = []

    def step(name):
        def run(mark):
            order.append(name)
            mark()
            sum(range(20_000))
            mark()

        return run

    samples = time_interleaved_ms({"a": step("a"), "b": step("b")}, budget_s=0, device="cpu")
    assert order[2:] == ["a", "b"] * 5
    assert all(len(laps) == 5 for laps in samples.values())
    assert all(first < second for laps in samples.values() for first, second in laps)
