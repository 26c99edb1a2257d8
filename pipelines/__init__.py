"""The text-to-video pipeline, and what builds and samples it."""
