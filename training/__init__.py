"""The training engine, which knows no model and no clip: configuration, run directory, checkpoints, the loop."""
