"""`hf-vlm evaluate RUN --data SOURCE --split test`"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.outputs import prepare_file


def run(words: Sequence[str]) -> None:
    """Prints the figures of a detector or an encoder as a table."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm evaluate",
        description="COCO figures of a detector; kNN and linear accuracy of an encoder's frozen features.",
    )
    parser.add_argument("run", help="folder of a detector or an encoder, or its name on the Hub")
    parser.add_argument("--data", required=True, help="labelled images: folder, file, Hub id or scenes")
    parser.add_argument("--format", help="format of the source, guessed when not given")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--num_examples", type=int, help="the first so many images of a split, of class folders evenly spread ones"
    )
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="unreadable images that are passed over")
    parser.add_argument("--save", type=Path, help="a JSON file for the figures")
    arguments = parser.parse_args(words)

    from hf_vlm.training.record import as_json
    from hf_vlm.training.run import evaluate_run, quiet_libraries

    if arguments.save is not None:
        prepare_file(arguments.save)
    quiet_libraries()
    metrics = evaluate_run(
        arguments.run,
        arguments.data,
        arguments.split,
        format=arguments.format,
        num_examples=arguments.num_examples,
        max_bad_fraction=arguments.max_bad_fraction,
    )
    width = max(map(len, metrics))
    print("\n".join(f"{name:<{width}}  {value:.4f}" for name, value in metrics.items()))
    if arguments.save:
        arguments.save.write_text(as_json(metrics) + "\n")
