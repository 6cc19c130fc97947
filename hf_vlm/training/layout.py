"""Ways of dividing a model among processes that training here would do wrong without a word."""

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from hf_vlm.models.ssl_teacher import TeacherMixin

__all__ = ["check_layout"]


def check_layout(model: nn.Module, accelerator: Accelerator) -> None:
    """Checks that training supports how the launcher divides the model.

    Raises:
        ValueError: It asks for tensor, context or sequence parallelism, or for DeepSpeed's ZeRO 3 with a teacher.
    """
    sizes = accelerator.parallelism_config
    if sizes is not None and sizes.non_data_parallel_size > 1:
        raise ValueError(
            f"The launcher's configuration asks for {', '.join(sizes.non_dp_dim_names)} parallelism, by which several "
            "processes train on the same images. Each process here has images of its own: divide the model by "
            "recipes/accelerate/fsdp2.yaml or hsdp.yaml."
        )
    if accelerator.distributed_type != DistributedType.DEEPSPEED or not isinstance(model, TeacherMixin):
        return
    if accelerator.state.deepspeed_plugin.zero_stage == 3:
        raise ValueError(
            f"{type(model).__name__} has a teacher that follows the weights of its student, which ZeRO 3 leaves "
            "empty between steps: use recipes/accelerate/fsdp2.yaml, which shards the same."
        )
