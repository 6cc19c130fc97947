"""What a cache of decoded images could save: CPU time of reading, of decoding, and of making training views.

    python benchmarks/decode_cost.py [--data SOURCE] [--size 96] [--quick]

The last line of stdout is JSON, in microseconds per image.
"""

import argparse
import json
import statistics
import time
from typing import Any

import cv2
import numpy as np

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.views import ViewTransform
from hf_vlm.models.modeling_simclr import SimCLRForPreTraining


def microseconds(source: str, transform: Transform, num_images: int) -> float:
    """CPU time per image, without the filling of the shuffle buffer."""
    examples = iter(ExampleStream(open_source(source).unlabelled().dataset, transform))
    for _ in range(50):
        next(examples)
    started = time.process_time()
    for _ in range(num_images):
        next(examples)
    return (time.process_time() - started) / num_images * 1e6


def main() -> None:
    """Prints medians over rounds in which the three stages alternate."""
    parser = argparse.ArgumentParser(description="CPU time of decoding within making views.")
    parser.add_argument("--data", default="scenes:easy")
    parser.add_argument("--size", type=int, nargs="+", default=[96], help="side of a view, or its height and width")
    parser.add_argument("--quick", action="store_true", help="few images: not a result to quote")
    arguments = parser.parse_args()
    size = (arguments.size[0], arguments.size[-1])
    cv2.setNumThreads(1)
    options = {**SimCLRForPreTraining.default_views, "size": list(size)}
    views = ViewTransform.from_dict(options, image_mean=[0.5] * 3, image_std=[0.5] * 3, num_channels=3)

    def read(example: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        return example

    def decode(example: dict[str, Any], generator: np.random.Generator) -> dict[str, Any]:
        return {"image": decode_image(example["image"], at_least=size)[0]}

    stages: dict[str, Transform] = {"read": read, "read_and_decode": decode, "two_views": views}
    num_rounds, num_images = (1, 100) if arguments.quick else (5, 800)
    rounds = [
        {name: microseconds(arguments.data, transform, num_images) for name, transform in stages.items()}
        for _ in range(num_rounds)
    ]
    print(json.dumps({name: round(statistics.median(found[name] for found in rounds), 1) for name in stages}))


if __name__ == "__main__":
    main()
