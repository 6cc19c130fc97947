"""`hf-vlm data SOURCE [--save sheet.png]`"""

import argparse
import contextlib
import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_vlm.cli.options import Parser, add_allow_outside, check_positive
from hf_vlm.cli.outputs import prepare_file, prepare_picture

if TYPE_CHECKING:
    from hf_vlm.data.source import Source

NUM_SCENES = 1000


def run(argv: Sequence[str]) -> None:
    """Inspects every image of a source; prints a report and commands to train on it, and renders some examples."""
    parser = Parser(
        prog="hf-vlm data",
        description="Reads every image once and reports sizes, classes, boxes, duplicates, unreadable files and "
        "labels that make no sense; renders examples on one picture.",
    )
    parser.add_argument("data", help="folder, file, Hub id or scenes")
    parser.add_argument("--split", default="train")
    parser.add_argument("--format", help="format of the source, guessed when not given")
    add_allow_outside(parser)
    parser.add_argument("--num_examples", type=int, help="read the first N images only")
    parser.add_argument("--save", type=Path, default="contact_sheet.png", help="picture of 24 examples to write")
    parser.add_argument(
        "--json",
        type=Path,
        help="JSON file for the report, all statistics, the names of images with issues and the first examples",
    )
    arguments = parser.parse_args(argv)
    check_positive(arguments, "num_examples")

    from tqdm.auto import tqdm

    from hf_vlm.data.inspection.inspect import format_report, inspect_source
    from hf_vlm.data.inspection.report import MAX_BAD_FRACTION
    from hf_vlm.data.io.durable import replace_text
    from hf_vlm.data.io.messages import one_line
    from hf_vlm.data.sources import open_source
    from hf_vlm.viz.contact_sheet import Reservoir, example_sheet

    prepare_picture(arguments.save, like="contact_sheet.png")
    if arguments.json is not None:
        prepare_file(arguments.json)
    source = open_source(
        arguments.data, arguments.split, format=arguments.format, allow_outside=arguments.allow_outside
    )
    num_examples = images_to_read(source.format, arguments.num_examples)
    reservoir = Reservoir(24)
    with tqdm(desc="Inspecting", total=num_examples, unit=" images", disable=None) as bar:

        def on_example(example: dict[str, object]) -> None:
            reservoir.add(example)
            bar.update()

        others = [] if num_examples is not None else other_splits(source, arguments.data, arguments.allow_outside)
        report = inspect_source(source, num_examples, on_example, others)

    print(f"{one_line(source.name)}: {source.format}, split {arguments.split}\n")
    text = format_report(report)
    print(text)
    if arguments.json is not None:
        content = {"data": source.name, "format": source.format, "split": arguments.split, "report": text}
        content |= report.as_json()
        replace_text(arguments.json, json.dumps(content, indent=2) + "\n")
        print(f"All statistics and names: {arguments.json}")
    if reservoir.examples:
        example_sheet(reservoir.examples, source.features).save(arguments.save)
        print(f"Examples to look at:   {arguments.save}")
        print("\nTo train on it:")
        is_alone = num_examples is None and Path(arguments.data).exists() and not _has_validation(others)
        bad = report.bad_fraction if report.bad_fraction > MAX_BAD_FRACTION else None
        for command in _training_commands(arguments, source, holdout=is_alone, bad_fraction=bad):
            print(f"  {one_line(command)}")


def other_splits(source: "Source", data: str, allow_outside: bool) -> "list[Source]":
    """The other splits of data on disk, opened without a word: they have a report of their own."""
    from hf_vlm.data.formats.splits import SPLIT_ALIASES, canonical_split
    from hf_vlm.data.sources import open_source

    opened: list[Source] = []
    if not Path(data).is_dir():
        return opened
    logging.disable(logging.WARNING)
    try:
        for split in SPLIT_ALIASES.keys() - {canonical_split(source.split)}:
            with contextlib.suppress(ValueError):
                opened.append(open_source(data, split, format=source.format, allow_outside=allow_outside))
    finally:
        logging.disable(logging.NOTSET)
    return sorted(opened, key=lambda other: other.split)


def _has_validation(splits: "list[Source]") -> bool:
    from hf_vlm.data.formats.splits import canonical_split

    return any(canonical_split(split.split) == "validation" for split in splits)


def _training_commands(
    arguments: argparse.Namespace, source: "Source", *, holdout: bool, bad_fraction: float | None
) -> list[str]:
    """Commands for this machine that pretrain on the source, and fine-tune on it for each task of its labels.

    With `holdout` they evaluate on a tenth of the images, where there is no split for it. Of images that cannot be
    read they accept twice the fraction: they may come early.
    """
    from hf_vlm.deploy.next_steps import fitting_preset, fitting_tasks, pretraining_recipe

    options = ["--data", source.name]
    if arguments.format is not None:
        options += ["--format", arguments.format]
    if arguments.allow_outside:
        options += ["--allow_outside", "true"]
    if arguments.split != "train":
        options += ["--train_split", arguments.split]
    if bad_fraction is not None:
        options += ["--max_bad_fraction", f"{min(2 * bad_fraction, 1):.2g}"]
    data = shlex.join(options)
    commands = [f"hf-vlm pretrain {pretraining_recipe(source)[0]} {data}"]
    for task in fitting_tasks(source):
        recipe = task.recipes[fitting_preset(task.recipes)[0]]
        evaluation = " --holdout 0.1" if holdout else ""
        commands.append(f"hf-vlm finetune {recipe} {data}{evaluation} --encoder runs/pretrain")
    return commands


def images_to_read(format: str, num_examples: int | None) -> int | None:
    """How many images a command reads where `num_examples` are asked for: None for all, but scenes have no end."""
    return NUM_SCENES if format == "scenes" and num_examples is None else num_examples
