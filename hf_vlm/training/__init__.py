"""Floor 5: recipes, the trainer, its optimiser groups and callbacks, probes, whole runs."""

from hf_vlm.training.trainer import VisionTrainer

__all__ = ["VisionTrainer"]
