"""`hf-vlm evaluate RUN --data SOURCE --split test [--report report] [--plot confusion.png] [--calibrate]`"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_vlm.cli.options import Parser, add_allow_outside, add_tiling, check_positive, tiling_of
from hf_vlm.cli.outputs import prepare_file, prepare_folder, prepare_picture

if TYPE_CHECKING:
    from hf_vlm.tasks.calibration import Calibration
    from hf_vlm.tasks.evaluation import EvaluatedSplit

logger = logging.getLogger(__name__)


def run(argv: Sequence[str]) -> None:
    """Prints the metrics of a model as a table, writes its report, and calibrates it where asked to."""
    arguments = _parser().parse_args(argv)
    check_positive(arguments, "num_examples")

    from hf_vlm.data.io.durable import replace_text
    from hf_vlm.training.record import as_json
    from hf_vlm.training.run import quiet_libraries
    from hf_vlm.viz.confusion import plot_confusion
    from hf_vlm.viz.report import write_report

    if arguments.save is not None:
        prepare_file(arguments.save)
    if arguments.plot is not None:
        prepare_picture(arguments.plot, like="confusion.png", option="--plot")
    if arguments.report is not None:
        prepare_folder(arguments.report)
    if arguments.calibrate:
        _check_calibrated(arguments.run)
    quiet_libraries()
    split = _evaluate(arguments)
    _print_metrics(split)
    evaluation = split.evaluation
    if arguments.save:
        replace_text(arguments.save, as_json(evaluation.metrics, digits=6) + "\n")
    if arguments.plot and evaluation.confusion is not None:
        plot_confusion(arguments.plot, evaluation.confusion, evaluation.class_names, counted=evaluation.counted)
        print(f"Confusion matrix: {arguments.plot}")
    if arguments.report:
        print(f"Report: {write_report(arguments.report, arguments.run, split)}")
    if arguments.calibrate:
        _calibrate(Path(arguments.run), split.task.calibrate(evaluation.metrics))


def _evaluate(arguments: argparse.Namespace) -> "EvaluatedSplit":
    held_out = None if arguments.holdout is None else _trained_holdout(arguments.run)
    if held_out not in (None, arguments.holdout):
        logger.warning(
            "The run has held out %g of its images, not %g: of the same data it has trained on some of these.",
            held_out,
            arguments.holdout,
        )
    from hf_vlm.data.formats.splits import NoSplitError
    from hf_vlm.tasks.evaluation import evaluate_split

    try:
        return evaluate_split(
            arguments.run,
            arguments.data,
            arguments.split or ("test" if arguments.holdout is None else "train"),
            format=arguments.format,
            holdout=arguments.holdout,
            num_examples=arguments.num_examples,
            allow_outside=arguments.allow_outside,
            max_bad_fraction=arguments.max_bad_fraction,
            needs_confusion=arguments.plot is not None,
            tiling=tiling_of(arguments),
        )
    except NoSplitError as error:
        held_out = _trained_holdout(arguments.run)
        option = "the --holdout that it had" if held_out is None else f"--holdout {held_out:g}"
        raise ValueError(
            f"{error}. Name one with --split, or evaluate on the images that fine-tuning held out with {option}."
        ) from error


def _trained_holdout(run: str) -> float | None:
    """The fraction of its images that a run has held out; None where it has held out none, or is not known."""
    from hf_vlm.training.recipe import load_recipe
    from hf_vlm.training.record import RECIPE_FILE

    path = Path(run, RECIPE_FILE)
    return load_recipe(path).get("holdout") if path.is_file() else None


def _print_metrics(split: "EvaluatedSplit") -> None:
    from hf_vlm.data.io.messages import one_line

    print(f"{one_line(split.source.name)}, split {one_line(split.split)}: {len(split.images):,} images\n")
    metrics = split.evaluation.metrics
    width = max(map(len, metrics))
    for name, value in metrics.items():
        text = f"-       {split.task.why_undefined(name)}" if math.isnan(value) else f"{value:.4f}"
        print(f"{one_line(name):<{width}}  {text}")


def _check_calibrated(run: str) -> None:
    from hf_vlm.features.exported import is_exported

    if not Path(run).is_dir():
        raise ValueError(f"--calibrate stores settings in the model's folder, but {run} is no folder.")
    if is_exported(run):
        raise ValueError(
            f"--calibrate: {run} is an export, whose program cannot change. Calibrate its run, and export it."
        )


def _calibrate(folder: Path, calibration: "Calibration") -> None:
    from hf_vlm.deploy.model_card import write_model_card
    from hf_vlm.deploy.push import writes_card

    if not calibration:
        raise ValueError("--calibrate: this evaluation determines neither a score threshold nor a temperature.")
    calibration.store(folder)
    if writes_card(folder):  # it states them
        write_model_card(folder)
    stored = ", ".join(f"{name} {value}" for name, value in calibration.settings.items())
    print(f"Stored in {folder}: {stored}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-vlm evaluate",
        description="Prints the metrics of a model's task: COCO metrics of a detector, accuracy and calibration of a "
        "classifier, mean IoU of a segmenter, kNN and linear accuracy of an encoder's frozen features, zero-shot "
        "accuracy and retrieval of a model of images and texts.",
    )
    parser.add_argument("run", help="folder of a model, or its name on the Hub")
    parser.add_argument("--data", required=True, help="labelled images: folder, file, Hub id or scenes")
    parser.add_argument("--format", help="format of the source, guessed when not given")
    add_allow_outside(parser)
    parser.add_argument("--split", help="test by default, or train with --holdout")
    parser.add_argument(
        "--holdout",
        type=float,
        help="fraction of the split to evaluate on: what fine-tuning with the same --holdout did not train on",
    )
    parser.add_argument("--num_examples", type=int, help="use the first N images, or N spread over class folders")
    add_tiling(parser)
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="fraction of unreadable images to accept")
    parser.add_argument("--save", type=Path, help="JSON file for the metrics")
    parser.add_argument("--plot", type=Path, help="picture of the confusion matrix, for tasks that have one")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FOLDER",
        help="folder for report.html, a page of curves, tables, worst images and likely label errors, and report.json",
    )
    parser.add_argument(
        "--calibrate",
        action="store_true",
        help="store in the model's folder what this split determines, as fine-tuning does with its held-out images: "
        "the score threshold of the best F1, or the temperature of a classifier; do not report on the same split",
    )
    return parser
