"""The arguments that say how ranks divide a model, and what follows for the images that each has."""

import os
from dataclasses import dataclass, field

from accelerate.parallelism_config import ParallelismConfig
from transformers import TrainingArguments
from transformers.distributed import DistributedConfig

__all__ = ["LayoutArguments"]


@dataclass
class LayoutArguments(TrainingArguments):
    """TrainingArguments with sizes of tensor and expert parallelism, the launcher's where it gives one.

    Raises:
        ValueError: if the ranks cannot be divided so.
    """

    tp_size: int = field(
        default=1,
        metadata={
            "help": "Number of ranks that divide each layer among them and train on the same images (tensor "
            "parallelism), in pretraining; weights are sharded among groups of them as by FSDP."
        },
    )
    ep_size: int = field(
        default=1,
        metadata={
            "help": "Number of ranks that divide the experts of a sparse encoder among them (expert parallelism), in "
            "pretraining; all weights are sharded as by FSDP."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        launched = self.parallelism_config
        if launched is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
            launched = ParallelismConfig()
        self._num_replicas = 1 if launched is None else launched.dp_replicate_size
        if launched is not None and launched.tp_size > 1:
            if self.tp_size not in (1, launched.tp_size):
                raise ValueError(f"tp_size is {self.tp_size}, but the launcher's is {launched.tp_size}.")
            self.tp_size = launched.tp_size
        self._check_layout()

    def _check_layout(self) -> None:
        if min(self.tp_size, self.ep_size) < 1:
            raise ValueError(f"tp_size and ep_size must be 1 or more, but are {self.tp_size} and {self.ep_size}.")
        if self.world_size % (self.tp_size * self._num_replicas):
            raise ValueError(
                f"tp_size is {self.tp_size}, but there are {self.world_size} ranks: start a multiple of it, as with "
                f"torchrun --nproc_per_node {self.tp_size}."
            )
        if self.ep_size > 1 and (self.ep_size % self.tp_size or self.world_size // self._num_replicas % self.ep_size):
            raise ValueError(
                f"ep_size is {self.ep_size}, but must be a multiple of tp_size ({self.tp_size}) and divide the number "
                f"of ranks ({self.world_size})."
            )
        if self.layout is not None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
            raise ValueError(
                "tp_size and ep_size shard the weights among all ranks by themselves: start the ranks without FSDP, "
                "as recipes/accelerate/tensor_parallel.yaml and expert_parallel.yaml do."
            )

    @property
    def layout(self) -> DistributedConfig | None:
        """How transformers is to divide the model; None where whoever launches the ranks decides."""
        if self.tp_size == self.ep_size == 1:
            return None
        return DistributedConfig(
            tp_size=self.tp_size,
            ep_size=self.ep_size,
            dp_replicate_size=self._num_replicas,
            fsdp_size=self.num_data_ranks // self._num_replicas,
        )

    @property
    def num_data_ranks(self) -> int:
        """Number of parts into which the images are divided: of the ranks that have images of their own."""
        return self.world_size // self.tp_size

    @property
    def data_rank(self) -> int:
        """Which part of the images this rank has; those that divide a layer have the same."""
        return self.process_index // self.tp_size
