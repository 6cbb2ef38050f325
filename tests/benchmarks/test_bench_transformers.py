"""The benchmark of transformers' models as a command, and that nothing wrong is timed."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import bench_transformers
from moe.transformers_backend import experts_forward, register_with_transformers

SMALL = ("--family", "qwen3_moe", "--tokens", "1,12", "--seconds", "0")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bench_transformers", *SMALL, *arguments])
    return bench_transformers.main()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_ratios_are_those_of_the_times(monkeypatch, capsys, tmp_path: Path, dtype: str) -> None:
    assert call(monkeypatch, "--dtype", dtype, "--json", str(tmp_path / "out.json")) == 0
    result = json.loads((tmp_path / "out.json").read_text())
    (row,) = result["rows"]
    assert (row["family"], row["dtype"], row["tokens"]) == ("qwen3_moe", dtype, [1, 12])
    times = row["step_ms"]
    assert set(times) == {"eager", "grouped_mm", "moe"}
    assert all(0 < row["forward_ms"][name] < times[name] for name in times)
    assert row["ratios"] == {name: times["moe"] / times[name] for name in ("eager", "grouped_mm")}
    assert f"moe/eager {row['ratios']['eager']:.2f}" in capsys.readouterr().out
    assert {"torch", "threads", "device"} <= set(result["stamp"])


def test_a_wrong_result_is_an_error(monkeypatch, capsys) -> None:
    def wrong(experts, x_TD, ids_TK, weights_TK):
        return experts_forward(experts, x_TD, ids_TK, weights_TK * 1.5)

    monkeypatch.setattr("moe.transformers_backend.experts_forward", wrong)
    try:
        assert call(monkeypatch) == 1
    finally:
        monkeypatch.undo()
        register_with_transformers()
    assert " differs from eager's by 0.0" in capsys.readouterr().err
