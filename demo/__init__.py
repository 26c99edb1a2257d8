"""The demo: the whole system at a small size, and its page."""
