"""The table of all tasks; a new one is one file here and one row."""

from hf_vlm.tasks.classification import CLASSIFICATION
from hf_vlm.tasks.detection import DETECTION
from hf_vlm.tasks.feature_extraction import FEATURE_EXTRACTION
from hf_vlm.tasks.instance_segmentation import INSTANCE_SEGMENTATION
from hf_vlm.tasks.semantic_segmentation import SEMANTIC_SEGMENTATION
from hf_vlm.tasks.task import Evaluation, Task
from hf_vlm.tasks.zero_shot import ZERO_SHOT

__all__ = ["PRETRAINABLE_TASKS", "TASKS", "TRAINABLE_TASKS", "Evaluation", "Task"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        FEATURE_EXTRACTION,
        DETECTION,
        INSTANCE_SEGMENTATION,
        SEMANTIC_SEGMENTATION,
        CLASSIFICATION,
        ZERO_SHOT,
    )
}
PRETRAINABLE_TASKS = tuple(name for name, task in TASKS.items() if task.find_labels)  # heads that `pretrain` takes
TRAINABLE_TASKS = tuple(name for name, task in TASKS.items() if task.recipes)  # the tasks of `finetune`
