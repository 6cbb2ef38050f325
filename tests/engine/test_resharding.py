"""A checkpoint that one layout wrote is, read and written by another, the same to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from checkpoint_tensors import differing_tensors
from layouts import OVERLAP, STEPS, Layout, train_in
from ranks_pool import RankPool

MODEL = "mla, mtp"
LAYOUTS = [
    Layout(MODEL, 1),
    Layout(MODEL, 2, "tp=2"),
    Layout(MODEL, 4, f"pp=2 vpp=2 ep=2 stage_layers=[2,1,1,1] {OVERLAP}"),
    Layout(MODEL, 4, "cp=2 ep=4 recompute=selective"),
    Layout(MODEL, 4, "tp=2 pp=2 ep=2 stage_layers=[4,1]"),
    Layout(MODEL, 8, "tp=2 cp=2 pp=2 ep=4"),
]
BF16 = [
    Layout("windows and sinks", 1, "precision=bf16"),
    Layout("windows and sinks", 4, "tp=2 cp=2 ep=4 precision=bf16"),
    Layout("windows and sinks", 4, f"pp=4 stage_layers=[1,2,2,0] precision=bf16 {OVERLAP}"),
]
SPLIT_EXPERTS = [
    Layout("biased experts", 2, "tp=2"),
    Layout("biased experts", 2, "tp=2 etp=2"),
    Layout("biased experts", 4, f"pp=2 etp=2 {OVERLAP}"),
    Layout("biased experts", 8, "tp=4 ep=2 etp=4"),
]
SPLIT_BF16 = [
    Layout("biased experts", 4, "ep=4 precision=bf16"),
    Layout("biased experts", 4, "tp=2 ep=2 etp=2 precision=bf16"),
]
PAIRS = [pair for layouts in (LAYOUTS, BF16, SPLIT_EXPERTS, SPLIT_BF16) for pair in permutations(layouts, 2)]
FAST = [
    (LAYOUTS[2], LAYOUTS[3]),
    (LAYOUTS[3], LAYOUTS[4]),
    (BF16[1], BF16[2]),
    (SPLIT_BF16[0], SPLIT_BF16[1]),
]


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(8, init_process_group=False)
    return ranks


@pytest.fixture(scope="module")
def written(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Path]:
    """The checkpoint of a layout after STEPS steps, trained once."""
    known: dict[Layout, Path] = {}

    def by(layout: Layout) -> Path:
        if layout not in known:
            folder = tmp_path_factory.mktemp("written")
            pool.run(train_in, layout, STEPS, folder, num_ranks=layout.num_ranks, timeout_s=280)
            known[layout] = folder / f"step_{STEPS:08d}"
        return known[layout]

    return by


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            *pair,
            marks=() if pair in FAST else pytest.mark.slow,
            id=f"{pair[0].name} to {pair[1].num_ranks} {pair[1].keys}",
        )
        for pair in PAIRS
    ],
)
def test_resharding_changes_no_byte(
    before: Layout,
    after: Layout,
    *,
    pool: RankPool,
    written: Callable[[Layout], Path],
    tmp_path: Path,
    record_layout: Callable[[str, dict[str, Any]], None],
) -> None:
    first = written(before)
    pool.run(train_in, after, 0, tmp_path, first, num_ranks=after.num_ranks, timeout_s=280)
    compared, differing = differing_tensors(tmp_path / f"step_{STEPS:08d}", first)
    record_layout(
        "pairs",
        {
            "model": before.model,
            "from": f"{before.num_ranks} {before.keys}".strip(),
            "to": f"{after.num_ranks} {after.keys}".strip(),
            "tensors": compared,
            "differing": len(differing),
        },
    )
    assert differing == []


def test_there_are_at_least_thirty_pairs() -> None:
    assert len(set(PAIRS)) == len(PAIRS) >= 30
