"""Every rule that joins keys: what breaks it, and that the message names the values and the remedy."""

from __future__ import annotations

import pytest
from broken_experts import BROKEN_EXPERTS

from moe.config import rules

BLENDS = ("data.train=[{prefix: a}]", "data.heldout=[{prefix: b}]")

# (overrides, ranks, what the one problem must say)
BROKEN = {
    **BROKEN_EXPERTS,
    "world": (["parallel.tp=2", "parallel.pp=2"], 6, ["6 rank(s)", "2*2*1 = 4", "--nproc", "multiple of 4"]),
    "ep and ranks": (["parallel.ep=8"], 4, ["parallel.ep=8", "4 rank(s)", "allowed: 1, 2, 4"]),
    "ep and experts": (
        ["parallel.ep=4", "model.num_experts=6"],
        4,
        ["parallel.ep=4", "model.num_experts=6", "allowed: 1, 2, 3, 6"],
    ),
    "fewer layers than stages": (
        ["parallel.pp=4", "model.num_layers=3"],
        4,
        ["model.num_layers=3", "4*1 = 4 chunks", "parallel.stage_layers"],
    ),
    "parts of experts and ranks": (
        ["parallel.ep=2", "parallel.etp=2"],
        2,
        ["parallel.ep*parallel.etp = 2*2 = 4", "2 rank(s)", "allowed: 1, 2"],
    ),
    "layers of stages": (
        ["parallel.pp=2", "model.num_layers=5", "parallel.stage_layers=[3,1]"],
        2,
        ["parallel.stage_layers=[3, 1]", "2 chunks with 4 layers", "2*1 = 2", "model.num_layers=5"],
    ),
    "chunks without a pipeline": (["parallel.vpp=2"], 1, ["parallel.vpp=2", "parallel.pp=1"]),
    "gather without buckets": (
        ["parallel.overlap_param_gather=true"],
        1,
        ["overlap_param_gather=true", "overlap_grad_reduce=true", "set both"],
    ),
    "rounds of chunks": (
        ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=6", "train.micro_batch_size=2"],
        2,
        ["parallel.vpp=2", "train.global_batch_size=6", "2*1*2 = 4", "use for example 8"],
    ),
    "rounds of chunks in evaluation": (
        ["parallel.pp=2", "parallel.vpp=2", "train.eval_sequences=6", "train.micro_batch_size=2"],
        2,
        ["train.eval_sequences=6", "2*1*2 = 4", "use for example 8"],
    ),
    "fused dispatcher of one rank": (
        ["parallel.dispatcher=deepep", "train.precision=bf16"],
        1,
        ["parallel.dispatcher=deepep", "parallel.ep=1", "alltoall"],
    ),
    "fused dispatcher in fp32": (
        ["parallel.dispatcher=hybridep", "parallel.ep=2", "train.precision=fp32"],
        2,
        ["parallel.dispatcher=hybridep", "train.precision=fp32", "hierarchical"],
    ),
    "fused dispatcher of many experts a token": (
        [
            "parallel.dispatcher=deepep",
            "parallel.ep=2",
            "train.precision=bf16",
            "model.num_experts=64",
            "model.top_k=33",
        ],
        2,
        ["parallel.dispatcher=deepep", "model.top_k=33", "32", "hierarchical"],
    ),
    "fused dispatcher without a GPU": (
        ["parallel.dispatcher=deepep", "parallel.ep=2", "train.precision=bf16", "engine.device=cpu"],
        2,
        ["parallel.dispatcher=deepep", "engine.device=cpu", "hierarchical"],
    ),
    "nodes of experts": (
        ["parallel.dispatcher=hierarchical", "parallel.ranks_per_node=2", "parallel.ep=2"],
        2,
        ["parallel.dispatcher=hierarchical", "parallel.ep=2", "parallel.ranks_per_node=2", "alltoall"],
    ),
    "nodes of split experts": (
        ["parallel.dispatcher=hierarchical", "parallel.ranks_per_node=4", "parallel.ep=2", "parallel.etp=2"],
        4,
        ["parallel.ep*parallel.etp = 2*2 = 4", "parallel.ranks_per_node=4", "alltoall"],
    ),
    "parts of experts under deepspeed": (
        ["engine.name=deepspeed", "parallel.etp=2"],
        2,
        ["parallel.etp=2", "engine.name=deepspeed", "use engine.name=megatron"],
    ),
    "pipeline under deepspeed": (
        ["engine.name=deepspeed", "parallel.pp=2"],
        2,
        ["parallel.pp=2", "engine.name=deepspeed", "use engine.name=megatron"],
    ),
    "context parallelism under deepspeed": (
        ["engine.name=deepspeed", "parallel.cp=2"],
        2,
        ["parallel.cp=2", "engine.name=deepspeed", "use engine.name=megatron"],
    ),
    "reduce overlap under deepspeed": (
        ["engine.name=deepspeed", "parallel.overlap_grad_reduce=true"],
        1,
        ["parallel.overlap_grad_reduce=true", "engine.name=deepspeed", "use engine.name=megatron"],
    ),
    "stage of megatron": (
        ["engine.zero_stage=3"],
        1,
        ["engine.zero_stage=3", "engine.name=megatron", "use engine.name=deepspeed"],
    ),
    "offload of megatron": (
        ["engine.offload=optimizer"],
        1,
        ["engine.offload=optimizer", "engine.name=megatron", "use engine.name=deepspeed"],
    ),
    "offload of whole weights": (
        ["engine.name=deepspeed", "engine.offload=all"],
        1,
        ["engine.offload=all", "engine.zero_stage=1", "use engine.offload=optimizer"],
    ),
    "meter without a command": (["energy.meter=command"], 1, ["energy.meter=command", "energy.node_command"]),
    "pue of nobody": (["energy.pue=1.2"], 1, ["energy.pue=1.2", "energy.pue_source"]),
    "tp and heads": (
        ["parallel.tp=2", "model.attention.num_heads=3", "model.attention.num_query_groups=0"],
        2,
        ["parallel.tp=2", "model.attention.num_heads=3", "allowed: 1, 3"],
    ),
    "tp and ffn": (
        ["parallel.tp=2", "model.ffn_hidden_size=25"],
        2,
        ["model.ffn_hidden_size=25", "allowed: 1, 5, 25"],
    ),
    "tp and shared expert": (
        ["parallel.tp=2", "model.shared_expert_hidden_size=9"],
        2,
        ["model.shared_expert_hidden_size=9", "allowed: 1, 3, 9"],
    ),
    "tp and vocabulary": (
        ["parallel.tp=2", "model.vocab_size=513"],
        2,
        ["model.vocab_size=513", "allowed: 1, 3"],
    ),
    "tp and sequence": (
        ["parallel.tp=2", "data.seq_length=65"],
        2,
        ["data.seq_length=65", "parallel.tp=2", "use for example 66"],
    ),
    "tp, cp and sequence": (
        ["parallel.tp=2", "parallel.cp=2", "data.seq_length=68"],
        4,
        ["data.seq_length=68", "2*2*2 = 8", "use for example 72"],
    ),
    "tp and query groups": (
        ["parallel.tp=4"],
        4,
        ["parallel.tp=4", "model.attention.num_query_groups=2", "allowed: 1, 2"],
    ),
    "query groups and heads": (
        ["model.attention.num_query_groups=3"],
        1,
        ["num_query_groups=3", "num_heads=4", "allowed: 1, 2, 4", "or 0"],
    ),
    "rotated part": (
        ["model.attention.rotary_dim=66", "model.attention.head_dim=64"],
        1,
        ["rotary_dim=66", "head_dim=64", "at most 64"],
    ),
    "yarn betas": (
        ["model.attention.yarn.beta_slow=32"],
        1,
        ["beta_slow=32", "beta_fast=32", "not below"],
    ),
    "pattern without a window": (
        ["model.attention.full_attention_every=2"],
        1,
        ["full_attention_every=2", "sliding_window=0", "set the window"],
    ),
    **{
        f"{key} in latent attention": (
            ["model.attention.kind=mla", f"model.attention.{key}={value}"],
            1,
            [f"model.attention.{key}={value}", "kind=mla", "leave it out"],
        )
        for key, value in {
            "rotary_dim": 2,
            "qk_norm": "head",
            "qkv_bias": "true",
            "output_bias": "true",
            "sinks": "true",
            "sliding_window": 4,
        }.items()
    },
    "rows of 16 bytes in fp32": (
        ["model.hidden_size=66", "train.precision=fp32"],
        1,
        ["model.hidden_size=66", "multiple of 4", "use 68"],
    ),
    "rows of 16 bytes in bf16": (
        ["model.expert_hidden_size=12", "train.precision=bf16"],
        1,
        ["model.expert_hidden_size=12", "multiple of 8", "use 16"],
    ),
    "top-k": (["model.top_k=9"], 1, ["model.top_k=9", "model.num_experts=8"]),
    "dense layers": (
        ["model.num_dense_layers=4"],
        1,
        ["num_dense_layers=4", "num_layers=4", "allowed: 0 to 3"],
    ),
    "top groups": (
        ["model.router.num_groups=2", "model.router.top_groups=3"],
        1,
        ["model.router.top_groups=3", "model.router.num_groups=2", "allowed: 1 to 2"],
    ),
    "groups of experts": (
        ["model.router.num_groups=8", "model.router.top_groups=4"],
        1,
        ["model.router.num_groups=8", "model.num_experts=8", "two or more", "allowed: 1, 2, 4"],
    ),
    "experts of the top groups": (
        ["model.router.num_groups=4", "model.top_k=3"],
        1,
        ["model.top_k=3", "the 2 experts", "top_groups=1 groups of 2", "use model.router.top_groups=2"],
    ),
    "score order": (
        ["model.router.score=sigmoid", "model.router.score_before_topk=false"],
        1,
        ["score=sigmoid", "set it to true"],
    ),
    "batch": (["train.global_batch_size=10"], 2, ["global_batch_size=10", "2*2 = 4", "use for example 8"]),
    "eval batch": (["train.eval_sequences=1"], 2, ["eval_sequences=1", "2*2 = 4", "use for example 4"]),
    "learning rates": (["optim.min_lr=1e-2"], 1, ["optim.min_lr=0.01", "optim.lr=0.001", "lower"]),
    "warm-up": (
        ["optim.warmup_steps=5", "optim.decay_steps=5"],
        1,
        ["warmup_steps=5", "decay_steps=5", "lower"],
    ),
    "stable rate of another schedule": (
        ["optim.stable_steps=5"],
        1,
        ["optim.stable_steps=5", "optim.schedule=wsd", "not cosine"],
    ),
    "stable rate after its decay": (
        ["optim.schedule=wsd", "optim.stable_steps=9", "optim.decay_steps=9"],
        1,
        ["optim.stable_steps=9", "optim.warmup_steps=0", "optim.decay_steps=9"],
    ),
    "clipping behind a norm": (
        ["optim.qk_clip=100", "model.attention.qk_norm=head"],
        1,
        ["optim.qk_clip=100", "qk_norm=head", "undo"],
    ),
    "muon of another engine": (
        ["optim.name=muon", "engine.name=deepspeed"],
        1,
        ["optim.name=muon", "engine.name=deepspeed", "use engine.name=megatron"],
    ),
    "clipping of another engine": (
        ["optim.qk_clip=100", "engine.name=deepspeed"],
        1,
        ["optim.qk_clip=100", "use engine.name=megatron"],
    ),
    "growing batch of another engine": (
        ["train.batch_schedule=[{steps: 1, global_batch_size: 4}]", "engine.name=deepspeed"],
        1,
        ["train.batch_schedule=[", "use engine.name=megatron"],
    ),
    "growing batch and ranks": (
        ["train.batch_schedule=[{steps: 1, global_batch_size: 6}]"],
        2,
        ["train.batch_schedule", "batches of 6", "train.micro_batch_size*dp = 4", "for example 8"],
    ),
    "growing batch and chunks": (
        ["parallel.pp=2", "parallel.vpp=2", "train.batch_schedule=[{steps: 1, global_batch_size: 6}]"],
        2,
        ["batches of 6", "train.micro_batch_size*dp*parallel.pp = 4"],
    ),
    "held-out alone": (["data.heldout=[{prefix: b}]"], 1, ["data.train and data.heldout", "together"]),
    "train alone": (["data.train=[{prefix: a}]", "data.tokenizer=bytes"], 1, ["data.heldout", "together"]),
    "default tokenizer for a blend": ([*BLENDS], 1, ["data.tokenizer", "tokenizer.json"]),
    "tokenizer without a blend": (
        ["data.tokenizer=bytes"],
        1,
        ["data.tokenizer=bytes", "data.train", "moe data prepare"],
    ),
    "power": (
        ["energy.full_w_per_cpu=0.5"],
        1,
        ["full_w_per_cpu=0.5", "idle_w_per_cpu=0.74"],
    ),
}


@pytest.mark.parametrize("case", BROKEN.values(), ids=BROKEN)
def test_broken_rule_is_the_one_problem_and_says_what_to_do(problems, case):
    overrides, world_size, words = case
    found = problems(*overrides, world_size=world_size)
    assert len(found) == 1, found
    for word in words:
        assert word in found[0]


@pytest.mark.parametrize("removed", rules.RULES, ids=lambda rule: " ".join(rule.keys))
def test_no_rule_can_be_removed_unnoticed(problems, monkeypatch, removed):
    monkeypatch.setattr(rules, "RULES", [rule for rule in rules.RULES if rule is not removed])
    unnoticed = [problems(*overrides, world_size=ranks) for overrides, ranks, _ in BROKEN.values()]
    assert () in unnoticed


SOUND_LAYOUTS = [
    (["parallel.tp=2", "parallel.ep=2"], 4),
    (["parallel.pp=2", "parallel.ep=2"], 4),
    (["parallel.pp=4", "parallel.tp=2", "parallel.ep=2"], 8),
    (["parallel.ep=4"], 4),
    (["parallel.tp=4", "model.attention.num_query_groups=0"], 4),
    (["parallel.tp=4", "model.attention.kind=mla"], 4),  # MLA has no query groups
    (["model.attention.sliding_window=8", "model.attention.full_attention_every=2"], 1),
    ([*BLENDS, "data.tokenizer=bytes"], 1),
    (["optim.warmup_steps=50"], 1),  # a trial run may end within the warm-up
    (["model.shared_expert_hidden_size=0", "parallel.tp=2"], 2),
    (["model.router.num_groups=4", "model.router.top_groups=2", "model.top_k=4"], 1),
    (["energy.full_w_per_cpu=0.74"], 1),
]


@pytest.mark.parametrize(("overrides", "world_size"), SOUND_LAYOUTS, ids=str)
def test_sound_layout_breaks_no_rule(problems, overrides, world_size):
    assert problems(*overrides, world_size=world_size) == ()


def test_world_size_none_leaves_out_what_depends_on_it(problems):
    layout = ("parallel.tp=2", "train.global_batch_size=7")
    assert problems(*layout, world_size=None) == ()
    assert problems(*layout, "model.ffn_hidden_size=25", world_size=None)[0].endswith("allowed: 1, 5, 25")
    # With three ranks the batch cannot be judged before the layout fits: one problem, not two.
    assert len(problems(*layout, world_size=3)) == 1


def test_rule_is_reported_where_its_first_written_key_stands(problems, sound_text):
    (in_the_file,) = problems(text=sound_text.replace("top_k: 2", "top_k: 9"))
    assert "sound.yaml:11: model.top_k=9 is more than" in in_the_file
    (overridden,) = problems("model.top_k=9")
    assert overridden.startswith("override 'model.top_k=9': model.top_k=9 is more than")
    (joined,) = problems("model.num_experts=1")
    assert "sound.yaml:11: model.top_k=2 is more than model.num_experts=1" in joined
    (never_written,) = problems("energy.idle_w_per_cpu=5")
    assert never_written.startswith("override 'energy.idle_w_per_cpu=5': energy.full_w_per_cpu=3.5 is below")


def test_rule_still_speaks_when_other_keys_are_invalid(problems):
    found = problems("model.hidden_size=none", "model.top_k=9", "optim.lr=-1", "optim.min_lr=5")
    assert len(found) == 3  # the rule about learning rates waits for a sound optim.lr
    assert any("model.top_k=9 is more than" in problem for problem in found)


def test_huge_sizes_are_answered_at_once(problems):
    (huge,) = problems("parallel.tp=2", "model.vocab_size=999999999999", world_size=2)
    assert "allowed: 1, 3" in huge
