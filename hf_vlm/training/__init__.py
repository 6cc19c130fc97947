"""Floor 3: recipes, the trainer, its optimiser groups and callbacks, evaluation, whole runs."""

from hf_vlm.training.trainer import VisionTrainer

__all__ = ["VisionTrainer"]
