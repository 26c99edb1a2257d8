"""Presets by name: `--config tokenizer/tiny` is tokenizer/tiny.yaml here."""
