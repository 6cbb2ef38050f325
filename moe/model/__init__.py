"""The transformer as Megatron specs around our MoE layer."""
