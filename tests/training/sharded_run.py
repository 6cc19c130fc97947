"""A pretraining run whose model may be sharded over processes without accelerators.

    accelerate launch --config_file recipes/accelerate/fsdp2.yaml --num_processes 2 sharded_run.py RECIPE.json

Without accelerators accelerate takes FSDP for DDP, silently: here it is set.
"""

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, DistributedType, PartialState
from torch.distributed.fsdp import FSDPModule

from hf_vlm.cli.main import leave_process_group
from hf_vlm.training.run import pretrain
from hf_vlm.training.trainer import VisionTrainer


def shard_on_cpu():
    stock = AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def main(recipe_file):
    shard_on_cpu()
    stock = VisionTrainer.training_step

    def training_step(self, *args, **kwargs):
        assert isinstance(self.model, FSDPModule) == ("ACCELERATE_USE_FSDP" in os.environ)
        return stock(self, *args, **kwargs)

    VisionTrainer.training_step = training_step
    pretrain(json.loads(Path(recipe_file).read_text()))
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
