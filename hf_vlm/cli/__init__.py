"""Floor 8: commands, one file each."""
