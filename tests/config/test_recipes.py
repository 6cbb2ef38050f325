"""Every recipe: its layout is valid and fits, its model has exactly the published parameters, it trains."""

from __future__ import annotations

import json
import math
import os
import re
import resource
import subprocess
import sys
from typing import Any

import pytest
from muon_runs import batches
from ranks_pool import RankPool
from recipes import CONFIGS, RECIPES, load_recipe, ranks_of, shrunk
from train_runs import command, environment

from moe.config import RunConfig, load_config
from moe.config.compare import differences
from moe.config.load import dump_config
from moe.counts.counts import params_active_no_embedding, params_mtp, params_total, router_bias_numbers
from moe.counts.shape import shape_of
from moe.planner.hardware_file import find_gpu
from moe.planner.memory import GIB, memory_of_stages
from moe.planner.settings import load_plan_config, make_job

FIRST = "deepseek-v3-671b"
ALONE = [f"parallel.{axis}=1" for axis in ("tp", "pp", "vpp", "ep", "cp")] + ["parallel.stage_layers=[]"]


def test_every_recipe_has_its_claims() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == RECIPES.keys() | {"quickstart"}


@pytest.mark.parametrize("name", RECIPES)
def test_layout_is_valid_for_its_gpus_and_fits(name: str) -> None:
    recipe = RECIPES[name]
    config = load_recipe(name, world_size=recipe.gpus)
    assert recipe.gpus % (8 * config.parallel.pp) == 0, "a stage is whole nodes"
    assert 8 % config.parallel.ep == 0, "experts of a layer lie in one node"
    job = make_job(load_plan_config(CONFIGS / f"{name}.yaml"), recipe.gpus, find_gpu(recipe.gpu))
    fullest = max(stage.needed_bytes for stage in memory_of_stages(job))
    assert fullest <= job.gpu.memory_bytes, f"{fullest / GIB:.1f} GiB"
    said = re.search(r"(\d+) of\s+(?:# )?(\d+) GiB", (CONFIGS / f"{name}.yaml").read_text())
    assert said is not None, "say how full a GPU is"
    assert [float(n) for n in said.groups()] == pytest.approx(
        [n / GIB for n in (fullest, job.gpu.memory_bytes)], abs=1
    )


@pytest.mark.parametrize("name", RECIPES)
def test_model_has_exactly_the_published_parameters(name: str) -> None:
    from moe.engine.one_rank import tensor_shapes

    recipe, shape = RECIPES[name], shape_of(load_recipe(name).model)
    biases = router_bias_numbers(shape) if recipe.counts_biases else 0
    assert params_total(shape) - params_mtp(shape) + biases == recipe.total
    without_mtp = shape_of(load_recipe(name, "model.mtp_layers=0").model)
    assert params_active_no_embedding(without_mtp) == recipe.active
    shapes = tensor_shapes(load_recipe(name, *ALONE, world_size=1))
    built = {key: math.prod(size) for key, size in shapes.items() if not key.endswith("bias_E")}
    assert sum(built.values()) == params_total(shape)


def test_plan_knows_that_muon_keeps_one_moment_of_matrices() -> None:
    """Of a stage with two expert layers; 16 ranks share out dense states, two those of experts."""

    def stage(name: str) -> float:
        path, gpu = CONFIGS / "sovereign-1t-a32b-h100.yaml", find_gpu("h100")
        job = make_job(load_plan_config(path, [f"optim.name={name}"]), 512, gpu)
        return memory_of_stages(job)[5].optimizer

    expert = 3 * 7168 * 2048
    attention = 7168 * (1536 + 576 + 64 * 128) + 1536 * 64 * 192 + 512 * 64 * 256
    numbers = 2 * ((attention + expert) / 16 + 384 * expert / 8 / 2)
    assert stage("adamw") - stage("muon") == pytest.approx(4 * numbers)


def test_both_sovereign_recipes_are_one_model() -> None:
    h100, b200 = (load_recipe(f"sovereign-1t-a32b-{gpu}") for gpu in ("h100", "b200"))
    assert differences(h100.model, b200.model) == {}
    assert h100.model.model_copy(update={"expert_precision": "mxfp8"}) == b200.model
    assert h100.optim == b200.optim


@pytest.mark.parametrize("name", ["sovereign-1t-a32b-h100", "sovereign-1t-a32b-b200"])
def test_sovereign_sizes_are_whole_tiles(name: str) -> None:
    model = load_recipe(name).model
    assert model.vocab_size % (128 * 8) == 0
    for size in (
        model.hidden_size,
        model.ffn_hidden_size,
        model.expert_hidden_size,
        model.attention.q_lora_rank,
    ):
        assert size % 128 == 0
    # A unit is a layer; the head is worth two.
    assert (model.num_layers + 2) % 32 == 0


@pytest.mark.slow
def test_search_over_4096_gpus_takes_seconds_and_no_torch() -> None:
    argv = command("plan", str(CONFIGS / "sovereign-1t-a32b-h100.yaml"), "--gpus", "4096", "--gpu", "h100")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*argv, "--search", "--json"], env=environment(), capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout)["layout"]["gpus"] == 4096
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime <= 10
    program = "import sys, moe.planner.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], env=environment(), check=False).returncode == 0


# ---- five steps -------------------------------------------------------------------------------------------


def five_steps(text: str) -> list[float]:
    """On one rank of a job: the losses of a shrunk recipe."""
    from pathlib import Path
    from tempfile import TemporaryDirectory

    import torch

    from moe.engine.megatron import MegatronEngine
    from moe.train.schedule import global_batch, learning_rate

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        config = load_config(path, world_size=int(os.environ["WORLD_SIZE"]))
    engine = MegatronEngine(config)
    losses = []
    try:
        for step in range(config.train.steps):
            samples = len(global_batch(step, config.train))
            train = config.train.model_copy(update={"global_batch_size": samples})
            engine.num_microbatches = samples // engine.layout.dp
            own = batches(config.model_copy(update={"train": train}), step, engine.dp_rank, engine.layout.dp)
            rate = learning_rate(step, config.optim, config.train.steps)
            losses.append(engine.train_step(own, rate).loss)
        return losses
    finally:
        engine.close()


@pytest.fixture(scope="module")
def pool(start_ranks: Any) -> RankPool:
    ranks: RankPool = start_ranks(4, init_process_group=False)
    return ranks


def kept(config: RunConfig) -> dict[str, Any]:
    """What makes a recipe what it is, whatever its sizes."""
    model, parallel = config.model, config.parallel
    return {
        "router": model.router,
        "switches": (model.expert_activation, model.expert_bias, model.expert_precision, model.mtp_layers),
        "attention": (model.attention.kind, model.attention.qk_norm, model.attention.sinks),
        "optimizer": (config.optim.name, config.optim.qk_clip, config.optim.schedule),
        "axes": [size > 1 for size in (parallel.pp, parallel.ep, parallel.tp, parallel.cp)],
        "layout": (parallel.vpp, parallel.dispatcher, config.train.recompute),
        "overlap": (parallel.overlap_grad_reduce, parallel.overlap_param_gather),
        "schedule": bool(config.train.batch_schedule),
        "ends": (model.num_dense_layers > 0, [chunk == 0 for chunk in last_chunks(config)]),
    }


def last_chunks(config: RunConfig) -> tuple[int, ...]:
    """Layers of the last stage's chunks; of a recipe that leaves the split to us none."""
    return config.parallel.stage_layers[config.parallel.pp - 1 :: config.parallel.pp]


def assert_trains(config: RunConfig, pool: RankPool) -> None:
    losses = pool.run(five_steps, dump_config(config), num_ranks=ranks_of(config))
    assert all(each == losses[0] for each in losses)
    assert all(math.isfinite(loss) for loss in losses[0])
    assert losses[0][-1] < losses[0][0] - 0.2, losses[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == FIRST else pytest.mark.slow) for name in RECIPES]
)
def test_shrunk_recipe_trains_five_steps(name: str, pool: RankPool) -> None:
    whole = load_recipe(name)
    config = shrunk(whole)
    assert kept(config) == kept(whole)
    assert_trains(config, pool)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if load_recipe(name).parallel.pp >= 4])
def test_shrunk_recipe_trains_on_four_stages(name: str, start_ranks: Any) -> None:
    """Four stages of two or four ranks: the first two and the last one as in the recipe, one for the rest.

    `shrunk` says what else is smaller. Here, unlike with two stages, activations pass through stages that
    are neither first nor last, and the first one has only the recipe's dense layers.
    """
    whole = load_recipe(name)
    config = shrunk(whole, stages=4)
    assert kept(config) == kept(whole)
    assert config.parallel.pp == 4
    assert config.model.num_dense_layers == whole.model.num_dense_layers
    assert config.parallel.stage_layers[:2] == tuple(min(3, n) for n in whole.parallel.stage_layers[:2])
    assert_trains(config, start_ranks(ranks_of(config), init_process_group=False))
