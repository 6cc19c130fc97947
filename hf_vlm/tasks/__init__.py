"""One file per task: what its data must hold, its transform, evaluation and post-processing."""
