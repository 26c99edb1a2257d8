"""The causal video tokenizer: frame arithmetic, layers, the autoencoder and its growth, metrics and training."""
