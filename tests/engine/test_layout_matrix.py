"""One model, one curve: every layout gives the losses, gradient norms and weights of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_tensors import tensors
from layouts import LAYOUTS, OVERLAP, STEPS, Layout, one_rank, train_in
from ranks_pool import RankPool

# Relative, in fp32, over three steps. Sums in another order change a loss by a few of its last bits; a batch
# that lacks one token changes it by 1e-3. The gradient norm sees what the loss forgives: a gradient that is
# counted twice or reduced over wrong ranks. Weights are compared as whole tensors, by the norm of their
# difference: Adam divides by the gradient's size, so where that is near 0 its last bits decide about steps.
TOLERANCES = {"losses": 1e-6, "grad_norm": 1e-5, "weights": 2e-4}
LOSSES = ("loss", "mtp_loss", "balance_loss", "z_loss", "heldout_nll")
Outcome = tuple[dict[str, Any], dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def trained(start_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Layout], Outcome]:
    """What all ranks of a layout agree on after STEPS steps, and the tensors of the checkpoint."""
    pool: RankPool = start_ranks(8, init_process_group=False)

    def train(layout: Layout) -> Outcome:
        folder: Path = tmp_path_factory.mktemp("checkpoints")
        results = pool.run(train_in, layout, STEPS, folder, num_ranks=layout.num_ranks, timeout_s=280)
        assert all(result == results[0] for result in results)
        return results[0], tensors(folder / f"step_{STEPS:08d}")

    return train


@pytest.fixture(scope="module")
def expected(trained: Callable[[Layout], Outcome]) -> Callable[[str], Outcome]:
    """The same of a model on one rank, trained once."""
    known: dict[str, Outcome] = {}

    def of(model: str) -> Outcome:
        if model not in known:
            known[model] = trained(one_rank(model))
        return known[model]

    return of


def worst(found: Any, wanted: Any) -> float:
    """Largest relative difference of two numbers or lists."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (found, wanted))
    return float(((a - b).abs() / b.abs().clamp(min=1e-12)).max())


def worst_tensor(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest norm of a difference over the norm of what is wanted, among weights and biases."""
    assert found.keys() == wanted.keys()
    weights = [key for key in wanted if not key.startswith("optimizer.")]
    differences = [(found[key] - wanted[key]).double().norm() for key in weights]
    norms = [wanted[key].double().norm().clamp(min=1e-12) for key in weights]
    return max(float(d / n) for d, n in zip(differences, norms, strict=True))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=() if layout.fast else pytest.mark.slow, id=layout.name)
        for layout in LAYOUTS
    ],
)
def test_layout_trains_as_one_rank_does(
    layout: Layout,
    trained: Callable[[Layout], Outcome],
    expected: Callable[[str], Outcome],
    record_layout: Callable[[str, dict[str, Any]], None],
) -> None:
    (wanted, wanted_weights), (found, weights) = expected(layout.model), trained(layout)
    differences = {
        "losses": max(worst(found[name], wanted[name]) for name in LOSSES),
        "grad_norm": worst(found["grad_norm"], wanted["grad_norm"]),
        "weights": worst_tensor(weights, wanted_weights),
    }
    record_layout(
        "layouts",
        {
            "model": layout.model,
            "ranks": layout.num_ranks,
            "layout": layout.keys,
            "steps": STEPS,
            "differences": differences,
            "tolerances": TOLERANCES,
        },
    )
    assert {name for name, size in differences.items() if not size <= TOLERANCES[name]} == set(), differences
    for name in ("counts", "params_total", "heldout_tokens"):
        assert found[name] == wanted[name], name


def test_the_matrix_has_at_least_thirty_layouts_each_once() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS) >= 30
    assert {layout.num_ranks for layout in LAYOUTS} == {2, 4, 8}


def test_overlapped_communication_changes_no_byte(trained: Callable[[Layout], Outcome]) -> None:
    plain, tensors_plain = trained(Layout("gqa", 2, "ep=2"))
    overlapped, tensors_overlapped = trained(Layout("gqa", 2, f"ep=2 {OVERLAP}"))
    # The squares of the norm are summed bucket by bucket; it stays below the one that would scale gradients.
    assert overlapped.pop("grad_norm") == pytest.approx(plain.pop("grad_norm"), rel=1e-6)
    assert overlapped == plain
    assert [key for key, value in tensors_plain.items() if not value.equal(tensors_overlapped[key])] == []
