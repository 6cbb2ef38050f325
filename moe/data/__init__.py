"""Text to tokens to batches: tokenizer, corpora, preparation, validation and Megatron datasets."""
