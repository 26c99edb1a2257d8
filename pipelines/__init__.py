"""What people call: the diffusers pipeline, and reports on what it gives."""
