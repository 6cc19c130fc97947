"""Floor 5: commands, one file each."""
