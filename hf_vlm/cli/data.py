"""`hf-vlm data SOURCE [--save sheet.png]`"""

import argparse
import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.outputs import prepare_file, prepare_picture

NUM_SCENES = 1000


def run(words: Sequence[str]) -> None:
    """Looks at every image of a source; prints what is there and how to train on it, and draws some."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm data",
        description="Looks at every image once: sizes, classes, boxes, duplicates, files that cannot be read, labels "
        "that make no sense; and draws examples on one picture.",
    )
    parser.add_argument("data", help="folder, file, Hub id or scenes")
    parser.add_argument("--split", default="train")
    parser.add_argument("--format", help="format of the source, guessed when not given")
    parser.add_argument("--num_examples", type=int, help="look at the first so many images")
    parser.add_argument("--save", type=Path, default="contact_sheet.png", help="picture of 24 examples to write")
    parser.add_argument("--json", type=Path, help="a JSON file for all figures and the names of all images found")
    arguments = parser.parse_args(words)

    from tqdm.auto import tqdm

    from hf_vlm.data.inspection.inspect import format_report, inspect_source
    from hf_vlm.data.io.messages import redact_url
    from hf_vlm.data.sources import guess_format, open_source
    from hf_vlm.viz.contact_sheet import Reservoir, example_sheet

    prepare_picture(arguments.save, like="contact_sheet.png")
    if arguments.json is not None:
        prepare_file(arguments.json)
    format = guess_format(arguments.data) if arguments.format is None else arguments.format
    source = open_source(arguments.data, arguments.split, format=format)
    num_examples = images_to_read(format, arguments.num_examples)
    reservoir = Reservoir(24)
    with tqdm(desc="Looking", total=num_examples, unit=" images", disable=None) as bar:

        def on_example(example: dict[str, object]) -> None:
            reservoir.add(example)
            bar.update()

        report = inspect_source(source, num_examples, on_example)

    name = redact_url(arguments.data)
    print(f"{name}: {format}, split {arguments.split}\n")
    print(format_report(report))
    if arguments.json is not None:
        content = {"data": name, "format": format, "split": arguments.split, **report.as_json()}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
        print(f"All figures and names: {arguments.json}")
    if reservoir.examples:
        example_sheet(reservoir.examples, source.features).save(arguments.save)
        print(f"Examples to look at:   {arguments.save}")
        print("\nTo train on it:")
        for command in _training_commands(name, arguments.format, arguments.split, report.boxes is not None):
            print(f"  {command}")


def _training_commands(source: str, format: str | None, split: str, has_boxes: bool) -> list[str]:
    words = ["--data", source]
    if format is not None:
        words += ["--format", format]
    if split != "train":
        words += ["--train_split", split]
    data = shlex.join(words)
    commands = [f"hf-vlm pretrain mae/vit_small.yaml {data}"]
    if has_boxes:
        commands.append(f"hf-vlm finetune detection/vit_small.yaml {data} --encoder runs/pretrain")
    return commands


def images_to_read(format: str, num_examples: int | None) -> int | None:
    """How many images a command reads where `num_examples` are asked for: None for all, but scenes have no end."""
    return NUM_SCENES if format == "scenes" and num_examples is None else num_examples
