"""A pretraining run in a process of its own that writes down what every step of every rank was given.

    python traced_run.py RECIPE.json TRACE_FOLDER          (or under torchrun or accelerate launch)

Appends a line of JSON per step to TRACE_FOLDER/<rank>.jsonl: the step, the loss, and a hash of each image,
which shows the images and their views.
"""

import hashlib
import json
import os
import resource
import signal
import sys
from pathlib import Path

from sharded_run import shard_on_cpu

from hf_vlm.cli.main import leave_process_group
from hf_vlm.training.run import pretrain
from hf_vlm.training.trainer import VisionTrainer

FULL_AT = 6  # steps, after which the rank that FULL_DISK names can write no large file


def main(recipe_file, folder):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error instead
    if "ACCELERATE_USE_FSDP" in os.environ:
        shard_on_cpu()
    recipe = json.loads(Path(recipe_file).read_text())
    stock = VisionTrainer.training_step
    trace = Path(folder, f"{os.environ.get('RANK', '0')}.jsonl")

    def training_step(self, model, inputs, *args, **kwargs):
        pixels = [hashlib.sha256(image.numpy().tobytes()).hexdigest()[:16] for image in inputs["pixel_values"]]
        loss = stock(self, model, inputs, *args, **kwargs)
        if self.state.global_step == FULL_AT and os.environ.get("FULL_DISK", "") == os.environ.get("RANK"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # more than is printed
        with trace.open("a") as file:
            file.write(json.dumps({"step": self.state.global_step, "loss": loss.item(), "pixels": pixels}) + "\n")
        return loss

    VisionTrainer.training_step = training_step
    checkpoints = list(Path(recipe["output_dir"]).glob("checkpoint-*/trainer_state.json"))
    try:
        pretrain(recipe | {"resume_from_checkpoint": "last" if checkpoints else None})
    except SystemExit:  # stopped by a signal
        leave_process_group()
        raise
    leave_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
