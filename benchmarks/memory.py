"""Memory that a training step takes on one device, and what it costs to take less.

    pip install "hf_vlm[optim]"
    python benchmarks/memory.py [--preset base] [--batch_size 16] [--device cpu]

Each arm is a run of `hf-vlm pretrain` in a process of its own, on built-in images. Its peak is that of the log: of the
process on a CPU, of the allocator on a GPU. Seconds are those of a step, the first left out. The last line is JSON.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from hf_vlm.training.callbacks import read_log

ARMS = {
    "none": [],
    "activation checkpointing": ["--activation_checkpointing", "true"],
    "AdamW in 8 bits": ["--optim", "adamw_torch_8bit"],
    "both": ["--activation_checkpointing", "true", "--optim", "adamw_torch_8bit"],
}


def measure(options: argparse.Namespace, extra: list[str], folder: Path) -> dict[str, float]:
    """Peak memory in GiB, seconds of a step, and the last loss of a run."""
    command = [sys.executable, "-m", "hf_vlm.cli", "pretrain", options.recipe, "--data", "scenes"]
    command += ["--encoder_preset", options.preset, "--per_device_train_batch_size", str(options.batch_size)]
    command += ["--images_to_see", str(options.steps * options.batch_size), "--logging_steps", "1"]
    command += [
        "--gradient_accumulation_steps",
        "1",
        "--probe_steps",
        "0",
        "--dataloader_num_workers",
        "0",
        "--save_strategy",
        "no",
    ]
    command += ["--use_cpu", str(options.device == "cpu").lower(), "--output_dir", str(folder), *extra]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    entries = [entry for entry in read_log(folder / "log.jsonl") if "loss" in entry]
    seconds = [options.batch_size / entry["images_per_second"] for entry in entries[1:]]
    peak = max(entry["peak_memory_gib"] for entry in entries)
    return {"gib": peak, "seconds": statistics.median(seconds), "loss": entries[-1]["loss"]}


def main() -> None:
    """Runs the arms one after the other and prints a table."""
    parser = argparse.ArgumentParser(description="Memory of a training step on one device.")
    parser.add_argument("--recipe", default="mae/vit_small.yaml")
    parser.add_argument("--preset", default="base")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        for index, (name, extra) in enumerate(ARMS.items()):
            found[name] = measure(options, extra, Path(temporary) / str(index))
            print(f"{name:<26} {found[name]['gib']:6.2f} GiB  {found[name]['seconds']:7.2f} s a step", flush=True)
    print(json.dumps({name: {key: round(value, 3) for key, value in arm.items()} for name, arm in found.items()}))


if __name__ == "__main__":
    main()
