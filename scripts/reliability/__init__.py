"""Measurements of what odd files, damage and kills do: `python -m promag.scripts.reliability.NAME`."""
