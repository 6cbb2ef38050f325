"""The recipes of configs/, and each of them small enough to train here; imported by tests as recipes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moe.config import RunConfig, load_config
from moe.config.schema import ModelSection, ParallelSection, TrainSection

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True)
class Recipe:
    """What a recipe claims.

    Attributes:
        gpus: How many its layout is for.
        gpu: Of which kind.
        total: Parameters as published, without multi-token prediction.
        counts_biases: The published total counts the biases of routers, which no gradient moves.
        active: Parameters that a token uses, without the input embedding.
    """

    gpus: int
    gpu: str
    total: int
    counts_biases: bool
    active: int


# Totals: of published models those of their cards and configs; of our own, its sizes multiplied out.
RECIPES = {
    "deepseek-v3-671b": Recipe(1024, "h100", 671_026_419_200, True, 36_625_603_584),
    "kimi-k2-1t": Recipe(512, "h100", 1_026_408_232_448, True, 31_687_072_768),
    "qwen3-235b-a22b": Recipe(256, "h100", 235_093_634_560, False, 21_568_433_664),
    "qwen3-30b-a3b": Recipe(16, "h100", 30_532_122_624, False, 3_041_867_776),
    "gpt-oss-120b": Recipe(64, "h100", 116_829_156_672, False, 5_132_849_472),
    "olmoe-7b-a1b": Recipe(8, "h100", 6_919_161_856, False, 1_178_994_688),
    "sovereign-1t-a32b-h100": Recipe(512, "h100", 1_026_435_970_560, True, 31_949_691_904),
    "sovereign-1t-a32b-b200": Recipe(256, "b200", 1_026_435_970_560, True, 31_949_691_904),
}


def load_recipe(name: str, *overrides: str, world_size: int | None = None) -> RunConfig:
    """A recipe as a user loads it."""
    return load_config(CONFIGS / f"{name}.yaml", overrides, world_size=world_size)


def shrunk(config: RunConfig, *, stages: int = 2) -> RunConfig:
    """The same run on a few ranks.

    As in the recipe: router, attention, experts' precision and bias, prediction of further tokens, optimizer
    with QK-clip, the form of both schedules, recompute, dispatcher, overlap, chunks of a stage, and what is
    special about the ends: dense layers, the last chunk without any.

    Smaller: widths, heads and words; five steps in fp32 on sequences of 32; a batch schedule of one stage,
    half as large; tp, ep and cp at most 2; pp at most `stages`. A chunk has at most three layers, and two
    where one stage stands for all between the first ones and the last.
    """
    parallel = _parallel(config.parallel, stages)
    layers = sum(parallel.stage_layers) or 2
    batch = 4 * parallel.pp
    smaller = ({"steps": 2, "global_batch_size": batch // 2},)
    train = TrainSection.model_validate(
        config.train.model_dump()
        | {
            "steps": 5,
            "batch_schedule": smaller if config.train.batch_schedule else (),
            "global_batch_size": batch,
            "micro_batch_size": 1,
            "eval_sequences": 8,
            "precision": "fp32",
        }
    )
    optim = {"lr": 3e-3, "min_lr": 3e-4, "warmup_steps": 1, "decay_steps": 0}
    optim["stable_steps"] = 3 if config.optim.schedule == "wsd" else 0
    return config.model_copy(
        update={
            # The only stage before the last one has experts as well.
            "model": _model(config.model, layers, dense=1 if parallel.pp <= 2 else layers),
            "parallel": parallel,
            "train": train,
            "optim": config.optim.model_copy(update=optim),
            "data": config.data.model_copy(update={"seq_length": 32}),
        }
    )


def ranks_of(config: RunConfig) -> int:
    """The fewest for its layout."""
    parallel = config.parallel
    return parallel.pp * max(parallel.tp * parallel.cp, parallel.ep)


def _parallel(parallel: ParallelSection, stages: int) -> ParallelSection:
    pp = min(parallel.pp, stages)
    chunks = [parallel.stage_layers[v * parallel.pp : (v + 1) * parallel.pp] for v in range(parallel.vpp)]
    layers = tuple(held for chunk in chunks if chunk for held in _chunks_of(chunk, pp))
    sizes = {"tp": min(parallel.tp, 2), "pp": pp, "ep": min(parallel.ep, 2), "cp": min(parallel.cp, 2)}
    return parallel.model_copy(update={**sizes, "stage_layers": layers})


def _chunks_of(layers: tuple[int, ...], pp: int) -> list[int]:
    """The first stages and the last one as they are; between them one for all others."""
    *firsts, last = layers
    rest = max(0, pp - 2)
    return [*(min(3, held) for held in firsts[:rest]), min(2, sum(firsts[rest:])), min(3, last)]


def _model(model: ModelSection, layers: int, *, dense: int) -> ModelSection:
    attention = model.attention
    heads = {"num_heads": 4, "num_query_groups": 2 if attention.query_groups < attention.num_heads else 0}
    latent = {"q_lora_rank": min(24, attention.q_lora_rank), "kv_lora_rank": 16}
    latent |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
    window = min(8, attention.sliding_window)
    sizes = {"head_dim": 16, "sliding_window": window, **heads, **latent}
    return model.model_copy(
        update={
            "num_layers": layers,
            "num_dense_layers": min(dense, model.num_dense_layers),
            "hidden_size": 128,
            "ffn_hidden_size": 128,
            "vocab_size": 96,
            "num_experts": 2 * max(4, model.router.num_groups),
            "top_k": min(4, model.top_k),
            "expert_hidden_size": 128,
            "shared_expert_hidden_size": min(128, model.shared_expert_hidden_size),
            "init_std": 0.02,  # that of width 7168 gives so narrow a model no signal
            "attention": attention.model_copy(update=sizes),
        }
    )
