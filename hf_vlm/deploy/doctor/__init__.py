"""What `hf-vlm doctor` examines; it needs no package to be installed, and torch is imported in another process."""
