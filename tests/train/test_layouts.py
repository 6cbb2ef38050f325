"""One model, one curve: every layout gives the losses of a single rank."""

from __future__ import annotations

from pathlib import Path

import pytest
from train_runs import losses, metrics, run, train_command

LAYOUTS = {
    "tp2": (2, ("parallel.tp=2",)),
    "tp2 ep2": (4, ("parallel.tp=2", "parallel.ep=2")),
    "pp2 vpp2 ep2, recomputed": (
        4,
        ("parallel.pp=2", "parallel.vpp=2", "parallel.ep=2", "train.recompute=full"),
    ),
}


def test_overlapped_cp2_ep2_gives_the_losses_of_one_rank(overlapped_run: Path, reference_run: Path) -> None:
    assert_same_curve(overlapped_run, reference_run)


# These start anew each; tests/engine/test_layout_matrix.py has more layouts in less time.
@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_gives_the_losses_of_one_rank(name: str, reference_run: Path, tmp_path: Path) -> None:
    nproc, overrides = LAYOUTS[name]
    run(train_command(tmp_path / "run", "train.steps=20", *overrides, nproc=nproc))
    assert_same_curve(tmp_path / "run", reference_run)


def assert_same_curve(run_dir: Path, reference_run: Path) -> None:
    expected, found = losses(reference_run), losses(run_dir)
    assert len(found) == len(expected) == 20
    assert found[:5] == pytest.approx(expected[:5], rel=1e-4)
    assert found == pytest.approx(expected, rel=1e-3)
    # The gradient norm sees what the loss forgives: a gradient reduced over wrong ranks or counted twice.
    norms, expected_norms = (
        [record["grad_norm"] for record in metrics(path)[:5]] for path in (run_dir, reference_run)
    )
    assert norms == pytest.approx(expected_norms, rel=1e-3)
