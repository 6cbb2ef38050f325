"""The one typed description of a run: what a YAML recipe or a dotted override may say.

Every section is frozen and refuses unknown keys. Rules that join several keys (ep divides num_experts, ...)
are in rules.py, reading files in tree.py, reporting errors in load.py. A default that is a choice states its
reason.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

# A larger count is a slip of the keyboard, which had better not meet a loop or a C integer.
_MOST = 10**12

Count = Annotated[int, Field(ge=1, le=_MOST)]
CountOrZero = Annotated[int, Field(ge=0, le=_MOST)]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    """Base of every config section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RunSection(Section):
    """Where a run is kept and what makes it reproducible."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    root: Path = Path("runs")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1234  # the width of numpy's seed
    deterministic: bool = False  # torch.use_deterministic_algorithms; costs speed on a GPU


class YarnSection(Section):
    """Rotary embeddings stretched to longer contexts (YaRN, arXiv 2309.00071)."""

    factor: Annotated[float, Field(ge=1)] = 1.0  # new length over the original; 1 is off
    original_length: Count = 4096  # positions that the model had seen before the stretch
    beta_fast: Positive = 32.0  # pairs that turn oftener over the original length stay; the paper's
    beta_slow: Positive = 1.0  # pairs that turn less are slowed by the whole factor
    truncate: bool = True  # round the ends of the ramp between the two to whole pairs; gpt-oss does not
    rotation_scale: Positive = 1.0  # multiplies cos and sin; the paper: 0.1 ln(factor) + 1
    softmax_scale: Positive = 1.0  # multiplies the logits; DeepSeek-V3: (0.1 ln(factor) + 1)^2


class AttentionSection(Section):
    """Grouped-query attention (arXiv 2305.13245) or multi-head latent attention (arXiv 2405.04434)."""

    kind: Literal["gqa", "mla"] = "gqa"
    num_heads: Count
    num_query_groups: CountOrZero = 0  # gqa: 0 means num_heads (multi-head attention)
    head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 128  # gqa; even because RoPE rotates pairs
    rope_base: Positive = 10_000.0  # RoFormer, arXiv 2104.09864
    rotary_dim: Annotated[int, Field(ge=0, multiple_of=2)] = 0  # gqa: leading part that turns; 0: head_dim
    yarn: YarnSection = YarnSection()
    # gqa: RMSNorm of queries and keys, in each head (Qwen3, arXiv 2505.09388) or over all heads (OLMoE)
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False  # gqa
    output_bias: bool = False  # gqa
    sinks: bool = False  # gqa: a learned logit for each head that takes attention from all keys (gpt-oss)
    sliding_window: CountOrZero = 0  # gqa: positions seen, the own included; 0: all before
    full_attention_every: CountOrZero = 0  # with a window, each n-th layer has none; 0: every layer has it
    q_lora_rank: CountOrZero = 0  # mla: 0 projects queries directly
    kv_lora_rank: Count = 512  # mla sizes: DeepSeek-V3, arXiv 2412.19437
    qk_nope_head_dim: Count = 128
    qk_rope_head_dim: Annotated[int, Field(ge=2, multiple_of=2)] = 64
    v_head_dim: Count = 128

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_heads


class RouterSection(Section):
    """How tokens choose experts, and what keeps the experts balanced."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    score_before_topk: bool = True  # False: softmax over the chosen logits only (Mixtral, gpt-oss)
    renormalize: bool = False  # divide the chosen weights by their sum
    scale: Positive = 1.0  # multiplies the weights (routed_scaling_factor of DeepSeek-V3)
    num_groups: Count = 1  # equal groups of neighbouring experts; DeepSeek-V3, arXiv 2412.19437, has 8
    top_groups: Count = 1  # groups that a token's experts may come from; DeepSeek-V3: 4
    # In training, drop pairs that leave an expert's last tile of rows mostly empty (after arXiv 2512.14080).
    rounding: Literal["none", "down", "nearest"] = "none"
    tile_rows: Count = 128  # of such a tile; the larger one of the grouped GEMM
    logit_bias: bool = False  # the gate has a trained bias (gpt-oss)
    jitter: Fraction = 0.0  # in training the gate's input is multiplied by 1 +- this (arXiv 2101.03961)
    capacity_factor: NonNegative = 0.0  # an expert keeps at most this times its fair share; 0 drops nothing
    # Scope of the load-balancing loss; global: over all data-parallel ranks (arXiv 2501.11873).
    aux_loss: Literal["none", "sequence", "batch", "global"] = "sequence"
    aux_loss_coeff: NonNegative = 0.0001  # DeepSeek-V3's complement to bias balancing
    z_loss_coeff: NonNegative = 0.0  # ST-MoE, arXiv 2202.08906, uses 1e-3
    bias_update_rate: NonNegative = 0.0  # aux-loss-free balancing, arXiv 2408.15664, uses 1e-3; 0 is off


class ModelSection(Section):
    """Sizes of the decoder-only transformer."""

    num_layers: Count
    num_dense_layers: CountOrZero = 0  # first layers with a dense feed-forward in place of experts
    hidden_size: Count
    ffn_hidden_size: Count  # dense layers
    vocab_size: Count
    num_experts: Count
    top_k: Count
    expert_hidden_size: Count
    expert_activation: Literal["swiglu", "geglu", "clamped_swiglu"] = "swiglu"  # clamped: gpt-oss's
    expert_bias: bool = False  # routed experts have biases (gpt-oss)
    # Operands of the experts' products: wide is train.precision, others are quantised (kernels/quantize).
    expert_precision: Literal["wide", "fp8", "fp8_power_of_two", "mxfp8"] = "wide"
    # The activation's input is saved in that format, too (activation_func_fp8_input_store of Megatron-Core).
    expert_fp8_input_store: bool = False
    # The products that lead into the activation and its backward, a third of the work, stay wide.
    expert_wide_into_activation: bool = False
    shared_expert_hidden_size: CountOrZero = 0  # 0: no shared expert
    attention: AttentionSection
    router: RouterSection = RouterSection()
    mtp_layers: CountOrZero = 0  # modules that predict further tokens in training (DeepSeek-V3, section 2.2)
    mtp_loss_coeff: NonNegative = 0.1  # of their mean loss; DeepSeek-V3: 0.3, then 0.1
    norm_eps: Positive = 1e-5
    init_std: Positive = 0.02  # GPT-2's; output projections are divided by sqrt(2 * num_layers)
    tie_embeddings: bool = False


class BlendPart(Section):
    """One tokenised corpus (the PREFIX of PREFIX.bin/.idx) and its share of the samples."""

    prefix: Path
    weight: Positive = 1.0


class DataSection(Section):
    """What is read. Without `train` the Python standard library's text is tokenised and used."""

    seq_length: Count
    tokenizer: str = "default"  # default | bytes | path to a tokenizer.json
    train: tuple[BlendPart, ...] = ()
    heldout: tuple[BlendPart, ...] = ()
    cache_dir: Path = Path("~/.cache/joulemoe")


class OptimSection(Section):
    """The optimizer and its learning rate. Steps are counted from the start of the run."""

    # muon (arXiv 2502.16982) for the matrices of layers and experts, with AdamW for all else
    name: Literal["adamw", "muon"] = "adamw"
    lr: Positive
    min_lr: NonNegative = 0.0
    # Of lr after the linear warm-up. cosine: falls to min_lr. wsd: stays until stable_steps, then falls so
    # (warm-up, stable, decay; arXiv 2404.06395). constant: stays.
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_steps: CountOrZero = 0
    stable_steps: CountOrZero = 0  # wsd: where the decay begins
    decay_steps: CountOrZero = 0  # where it ends; 0: at train.steps
    weight_decay: NonNegative = 0.1  # the usual of this size class (GPT-3, DeepSeek-V3)
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Positive = 1e-8
    muon_momentum: Fraction = 0.95  # Keller Jordan's and Moonlight's
    # Attention logit above which a head's queries and keys are scaled down (arXiv 2507.20534: 100); 0: never
    qk_clip: NonNegative = 0.0
    clip_grad_norm: NonNegative = 1.0  # 0: no clipping


class BatchStage(Section):
    """So many steps with such a batch."""

    steps: Count
    global_batch_size: Count


class TrainSection(Section):
    """How long and how much at once."""

    steps: Count
    global_batch_size: Count  # sequences a step, over all ranks
    batch_schedule: tuple[BatchStage, ...] = ()  # smaller batches of the first steps, one stage after another
    micro_batch_size: Count
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16 keeps fp32 main parameters and gradients
    # Computed again in the backward pass instead of kept. selective: attention between its projections, with
    # MLA's norms and up-projections; full: whole layers, of which only the inputs stay.
    recompute: Literal["none", "selective", "full"] = "none"
    log_interval: Count = 1
    eval_interval: CountOrZero = 0  # 0: only at the end
    eval_sequences: Count = 64
    init_from: Path | None = None  # a checkpoint whose weights a new run starts from (moe convert import)


class ParallelSection(Section):
    """The layout; data parallelism takes what is left of the world size. See rules.py."""

    tp: Count = 1
    pp: Count = 1
    vpp: Count = 1  # model chunks of a pipeline rank, run in turns (interleaved 1F1B, arXiv 2104.04473)
    # Layers of each of the pp * vpp chunks in model order, chunk i on stage i % pp. Empty: balanced by their
    # work for a token; the last chunk also has the output layer and multi-token prediction.
    stage_layers: tuple[CountOrZero, ...] = ()
    ep: Count = 1
    # Ranks that split each expert along its hidden size; tensor-parallel ranks are also used by ep, which
    # leaves products whole and wide. Neighbouring ranks: etp * ep * (experts' replicas) = tp * cp * dp.
    etp: Count = 1
    # How rows reach experts. alltoall: one for each (token, expert). hierarchical: one for each (token, node)
    # over the network, handed on inside the node. deepep, hybridep: as many rows by kernels of the package
    # deep_ep (Hopper, Blackwell), which a batch at start compares with alltoall (moe.layer.dispatch_check).
    dispatcher: Literal["alltoall", "hierarchical", "deepep", "hybridep"] = "alltoall"
    ranks_per_node: CountOrZero = 0  # for hierarchical; 0: as many as the launcher started on this machine
    overlap_shared_expert: bool = False  # compute shared experts while rows travel; the same bits
    cp: Count = 1  # ranks that split a sequence inside attention
    overlap_grad_reduce: bool = False  # reduce gradients during the last backward pass of a step
    overlap_param_gather: bool = False  # gather updated weights during the first forward pass of a step


class EngineSection(Section):
    """Which engine trains, and where."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    # deepspeed: what is sharded over data-parallel ranks. 1 moments and fp32 weights, 2 gradients, 3 all
    # weights (arXiv 1910.02054); what of it lives in the host's memory, `all` with the weights of stage 3.
    zero_stage: Literal[1, 2, 3] = 1
    offload: Literal["none", "optimizer", "all"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    kernels: Literal["auto", "torch", "triton"] = "auto"  # auto is triton on CUDA, torch elsewhere
    # A collective that waits longer ends the run; at most a month. Ten minutes outlast a slow file system.
    timeout_s: Annotated[float, Field(gt=0, le=2_678_400)] = 600.0


class CheckpointSection(Section):
    """When checkpoints are written and how many stay."""

    interval: CountOrZero = 100  # steps; 0: only at the end
    keep: Count = 2


class EnergySection(Section):
    """How energy is read; an estimate is always called one."""

    meter: Literal["auto", "nvml", "amd", "rapl", "command", "estimate"] = "auto"
    # The model of an estimate: idle_w + (full_w - idle_w) * busy share, for each logical CPU. Defaults:
    # averages of server CPUs that Cloud Carbon Footprint derives from SPECpower; see metering/estimate.py.
    idle_w_per_cpu: NonNegative = 0.74
    full_w_per_cpu: NonNegative = 3.5
    gpu_w: NonNegative = 0.0  # per GPU, where NVML is absent; their power limit is an upper bound
    # Argv of a program that prints what a whole machine draws: see metering/command_meter.py.
    node_command: tuple[str, ...] = ()
    # What surrounds the meter, where nothing measures it; defaults: ratings, see metering/boundaries.py.
    host_w_per_gpu: NonNegative = 575.0
    fabric_w_per_gpu: NonNegative = 251.0
    pue: NonNegative = 0.0  # facility over IT energy; 0: unknown
    pue_source: str = ""  # who states it, and for when
    record: bool = False  # keep every sample of GPU meters: 17 lines a second and machine in energy_trace/


class TrackingSection(Section):
    """Experiment trackers. `offline` writes wandb's files into the run folder and opens no connection."""

    wandb: Literal["offline", "online", "disabled"] = "offline"
    project: str = "joulemoe"


class RunConfig(Section):
    """A whole run."""

    run: RunSection
    model: ModelSection
    data: DataSection
    optim: OptimSection
    train: TrainSection
    parallel: ParallelSection = ParallelSection()
    engine: EngineSection = EngineSection()
    checkpoint: CheckpointSection = CheckpointSection()
    energy: EnergySection = EnergySection()
    tracking: TrackingSection = TrackingSection()
