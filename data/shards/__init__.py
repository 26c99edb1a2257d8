"""Clips in tar shards: reading, the index, the stream that training draws from, and writing."""
