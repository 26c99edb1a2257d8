"""Text-to-video diffusion in the tokenizer's latent space: text, transformer, flow, cached latents and training."""
