"""An imported checkpoint in every layout, and the way back from what each layout saved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hf_models import FAMILIES, add_predictions, make_model, same_bytes, save_model, tensors_of
from ranks_pool import RankPool

from moe.config.schema import ModelSection, ParallelSection
from moe.convert.export_hf import export_hf, open_checkpoint
from moe.convert.import_hf import import_hf
from moe.convert.model_of import run_config

TOLERANCE = 1e-4  # relative, fp32; see test_families.py
# tp, ep, pp, etp
LAYOUTS = [(1, 1, 1, 1), (1, 2, 1, 1), (2, 2, 1, 1), (1, 2, 2, 1), (1, 2, 1, 2)]
FAST = {"qwen3_moe": LAYOUTS[:4]}  # of the others two, which contain the first two
MODELS = [*FAMILIES, "deepseek_v3 with mtp"]
CASES = [
    pytest.param(
        model,
        layout,
        marks=[] if layout in FAST.get(model, LAYOUTS[2:4]) else [pytest.mark.slow],
        id=f"{model}-tp{layout[0]} ep{layout[1]} pp{layout[2]} etp{layout[3]}",
    )
    for model in MODELS
    for layout in LAYOUTS
]
SEQUENCES, LENGTH, SEED = 4, 16, 5


@pytest.fixture(scope="module")
def pool(start_ranks: Callable[..., RankPool]) -> RankPool:
    return start_ranks(4, init_process_group=False)


@pytest.fixture(scope="module")
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A folder that holds the family's model as `hf` and `ours`, and the model."""
    folder = tmp_path_factory.mktemp("imported")
    family, _, more = request.param.partition(" ")
    model = make_model(family, "even", seed=SEED)
    save_model(model, folder / "hf")
    if more:
        add_predictions(model, folder / "hf", with_copies=True)
    import_hf(folder / "hf", folder / "ours", check_logits=False, note=lambda _: None)
    return folder, model


def sample_tokens(vocab_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(vocab_size, (SEQUENCES, LENGTH + 1), generator=generator)


def batches(tokens: torch.Tensor, dp_rank: int, dp_size: int) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's sequences, one a micro-batch."""
    for part in tokens[dp_rank::dp_size].split(1):
        yield {
            "tokens_BS": part[:, :-1].contiguous(),
            "labels_BS": part[:, 1:].contiguous(),
            "loss_mask_BS": torch.ones(1, LENGTH),
            "position_ids_BS": torch.arange(LENGTH).expand(1, LENGTH),
        }


def run_layout(
    model: ModelSection,
    checkpoint: Path,
    layout: tuple[int, int, int, int],
    out: Path,
    precision: Literal["fp32", "bf16"] = "fp32",
) -> dict[str, Any]:
    """On one rank: load, keep the logits of its last stage, take a training step, save."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from moe.checkpoint.save import save_checkpoint
    from moe.engine.megatron import MegatronEngine

    torch.set_num_threads(1)
    tp, ep, pp, etp = layout
    base = run_config(model, precision=precision, seq_length=LENGTH)
    train = base.train.model_copy(update={"global_batch_size": SEQUENCES})
    config = base.model_copy(
        update={"parallel": ParallelSection(tp=tp, ep=ep, pp=pp, etp=etp), "train": train}
    )
    engine = MegatronEngine(config)
    try:
        engine.load_weights(checkpoint)
        tokens = sample_tokens(model.vocab_size)

        def forward(data: Any, stage: Any) -> tuple[torch.Tensor, None]:
            batch = next(data)
            return stage(batch["tokens_BS"], batch["position_ids_BS"], None), None

        engine.ddps[0].eval()
        logits = []
        with torch.no_grad():
            if model.mtp_layers == 0:  # megatron-core 0.16.1 gives no logits beside multi-token prediction
                logits = get_forward_backward_func()(
                    forward_step_func=forward,
                    data_iterator=batches(tokens, engine.dp_rank, engine.layout.dp),
                    model=engine.ddps,
                    num_microbatches=engine.num_microbatches,
                    seq_length=LENGTH,
                    micro_batch_size=1,
                    forward_only=True,
                )
        # A step that changes no weight: saving needs the moments that the first step makes.
        step = engine.train_step(batches(tokens, engine.dp_rank, engine.layout.dp), lr=0.0)
        save_checkpoint(engine, out, 1, {"model": model.model_dump(mode="json")}, keep=1)
        return {
            "logits": torch.cat(logits) if logits else None,
            "dp_rank": engine.dp_rank,
            "dp": engine.layout.dp,
            "loss": step.loss,
            "grad_norm": step.grad_norm,
            "mtp_loss": step.mtp_loss,
        }
    finally:
        engine.close()


def whole_logits(results: list[dict[str, Any]]) -> torch.Tensor:
    """Of all sequences and the whole vocabulary; ranks of one dp rank hold its parts in order of tp."""
    dp = results[0]["dp"]
    logits = [
        torch.cat([r["logits"] for r in results if r["dp_rank"] == rank and r["logits"] is not None], -1)
        for rank in range(dp)
    ]
    return torch.stack(logits, dim=1).flatten(0, 1)


@pytest.mark.parametrize(("imported", "layout"), CASES, indirect=["imported"], scope="module")
def test_logits_equal_in_every_layout_and_export_loses_nothing(
    pool: RankPool, imported: tuple[Path, Any], layout: tuple[int, int, int, int], tmp_path: Path
) -> None:
    folder, theirs = imported
    tp, ep, pp, etp = layout
    source = open_checkpoint(folder / "ours", None)
    num_ranks = pp * max(tp, ep * etp)
    results = pool.run(
        run_layout, source.model, folder / "ours", layout, tmp_path / "saved", num_ranks=num_ranks
    )
    with torch.no_grad():
        expected = theirs(sample_tokens(theirs.config.vocab_size)[:, :-1]).logits
    found = whole_logits(results) if source.model.mtp_layers == 0 else expected
    assert float((found - expected).abs().max() / expected.abs().max()) < TOLERANCE
    export_hf(
        tmp_path / "saved" / "step_00000001",
        tmp_path / "back",
        family=source.family.name,
        check_logits=False,
        note=lambda _: None,
    )
    assert same_bytes(tensors_of(folder / "hf"), tensors_of(tmp_path / "back")) == []
    # A training step sees what logits forgive: gradients reduced over wrong ranks or counted twice.
    facts = [(result["loss"], result["grad_norm"], result["mtp_loss"]) for result in results]
    assert len(set(facts)) == 1
    reference = REFERENCE.setdefault(str(folder), facts[0])
    assert facts[0][0] == pytest.approx(reference[0], rel=1e-5)
    assert facts[0][1] == pytest.approx(reference[1], rel=1e-4)
    assert facts[0][2] == pytest.approx(reference[2], rel=1e-5)
    assert (facts[0][2] > 0) == (source.model.mtp_layers > 0)


REFERENCE: dict[str, tuple[float, ...]] = {}  # losses and gradient norm of the first layout, a single rank


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bf16_weights_start_a_run_of_either_precision(
    pool: RankPool, tmp_path: Path, precision: Literal["fp32", "bf16"]
) -> None:
    """A step that changes no weight goes through the optimizer's own copy of them, and back."""
    model = make_model("qwen3_moe", "even", seed=SEED, moe_intermediate_size=16).bfloat16()
    import_hf(save_model(model, tmp_path / "hf"), tmp_path / "ours", check_logits=False, note=str)
    section = open_checkpoint(tmp_path / "ours", None).model
    pool.run(run_layout, section, tmp_path / "ours", (1, 2, 1, 1), tmp_path / "saved", precision, num_ranks=2)
    saved = tmp_path / "saved" / "step_00000001"
    export_hf(saved, tmp_path / "back", family="qwen3_moe", check_logits=False, note=str)
    back = {name: tensor.bfloat16() for name, tensor in tensors_of(tmp_path / "back").items()}
    assert same_bytes(tensors_of(tmp_path / "hf"), back) == []
