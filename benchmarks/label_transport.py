"""What it costs to move the labels of a detection batch out of a data worker: as tensors, and in one message.

    python benchmarks/label_transport.py [--quick]

16 images of 20 boxes and 6 tensors each, one worker; milliseconds per batch, wall time and CPU time of worker and
process together, contestants alternating. The images are one pixel, so that only labels count. The last line is JSON.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader, IterableDataset

from hf_vlm.data.transforms.collate import collate_detection, stack

BATCH_SIZE, NUM_BOXES = 16, 20
EXAMPLE = {
    "pixel_values": torch.zeros(3, 1, 1),
    "labels": {
        "class_labels": torch.zeros(NUM_BOXES, dtype=torch.int64),
        "boxes": torch.full((NUM_BOXES, 4), 0.5),
        "image_id": torch.zeros(1, dtype=torch.int64),
        "orig_size": torch.zeros(2, dtype=torch.int64),
        "area": torch.ones(NUM_BOXES),
        "iscrowd": torch.zeros(NUM_BOXES, dtype=torch.int64),
    },
}


class Endless(IterableDataset[dict[str, Any]]):
    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {**EXAMPLE, "labels": {name: value.clone() for name, value in EXAMPLE["labels"].items()}}


def as_tensors(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "pixel_values": stack([example["pixel_values"] for example in examples]),
        "labels": [example["labels"] for example in examples],
    }


def cpu_seconds() -> float:
    process = psutil.Process()
    times = [each.cpu_times() for each in (process, *process.children())]
    return sum(each.user + each.system for each in times)


def milliseconds(collate: Callable[..., Any], num_batches: int) -> tuple[float, float]:
    batches = iter(DataLoader(Endless(), batch_size=BATCH_SIZE, num_workers=1, collate_fn=collate))
    for _ in range(20):
        next(batches)
    cpu, clock = cpu_seconds(), time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return 1e3 * (time.perf_counter() - clock) / num_batches, 1e3 * (cpu_seconds() - cpu) / num_batches


def main() -> None:
    """Prints medians and the JSON line."""
    parser = argparse.ArgumentParser(description="Moving labels out of data workers.")
    parser.add_argument("--quick", action="store_true", help="few batches: not a result to quote")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, num_batches = (2, 50) if arguments.quick else (7, 200)
    contestants = {"as_tensors": as_tensors, "ours": collate_detection}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, collate in contestants.items():
            found[name].append(milliseconds(collate, num_batches))
    results = {}
    for name, pairs in found.items():
        for index, clock in enumerate(("wall", "cpu")):
            each = [pair[index] for pair in pairs]
            results[f"{name}_{clock}_ms"] = round(statistics.median(each), 2)
            median, spread = statistics.median(each), f"{min(each):.2f} to {max(each):.2f}"
            print(f"{name:<10} {clock:<4} {median:6.2f} ms per batch ({spread})")
    print(json.dumps(results | ({"quick": True} if arguments.quick else {})))


if __name__ == "__main__":
    main()
