"""The command `hf-vlm`: one visible list of commands, each a file of this folder with `run(argv)`."""

import errno
import importlib
import importlib.metadata
import io
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from hf_vlm.models.nearest_name import did_you_mean

COMMANDS = {
    "data": "inspect images and labels:                 hf-vlm data SOURCE --save contact_sheet.png",
    "curate": "drop copies and poor images of shards:     hf-vlm curate SHARDS OUTPUT_DIR --num_images 1000000",
    "views": "see the views that a recipe trains on:     hf-vlm views RECIPE --data SOURCE --save views.png",
    "convert": "import an encoder of transformers:         hf-vlm convert facebook/dinov2-small runs/dinov2",
    "pretrain": "pretrain an encoder on unlabelled images:  hf-vlm pretrain RECIPE --data SOURCE",
    "finetune": "fine-tune a model on labelled images:      hf-vlm finetune RECIPE --data SOURCE --encoder RUN",
    "evaluate": "metrics of a model on a split:             hf-vlm evaluate RUN --data SOURCE --split test",
    "probe": "accuracies of an encoder:                  hf-vlm probe RECIPE --data SOURCE --encoder RUN",
    "embed": "features, neighbours and maps of images:   hf-vlm embed RUN --data SOURCE --neighbors neighbors.png",
    "search": 'images found by words or by an image:      hf-vlm search "a red apple" --index features.parquet',
    "predict": "objects or classes of images:              hf-vlm predict RUN photo.jpg --save out.png",
    "track": "objects of a video, numbered:              hf-vlm track RUN clip.mp4 --save out.mp4",
    "plan": "cost of pretraining on a cluster:          hf-vlm plan RECIPE --gpus 64 --gpu h200",
    "export": "for ONNX and other runtimes:               hf-vlm export RUN --format onnx",
    "serve": "predictions over HTTP and a web page:      hf-vlm serve RUN",
    "push": "publish a run on the Hub:                  hf-vlm push RUN my-org/my-detector",
    "doctor": "examine the installation and machine:      hf-vlm doctor",
    "demo": "all of it on built-in images, offline:     hf-vlm demo",
}
# What a disk says to whoever writes, for outputs that are written without a message of their own.
DISK_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free space there, or write elsewhere"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "name a place that you may read and write"),
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "name another place, or move what is there"),
}
RESUME_TRAINING = (
    " What is saved is kept; --resume_from_checkpoint last resumes from the last checkpoint, if there is one."
)
RESUME = {"pretrain": RESUME_TRAINING, "finetune": RESUME_TRAINING, "curate": " The same command continues."}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, or 2 for something the user can fix, reported in one message."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help"):
        print("Usage: hf-vlm COMMAND ... ; hf-vlm COMMAND --help explains one.\n")
        print("\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items()))
        return 0
    if command == "--version":
        print(f"hf_vlm {importlib.metadata.version('hf_vlm')}")
        return 0
    if command not in COMMANDS:
        near = did_you_mean(command, COMMANDS) or "."
        print(f"hf-vlm: there is no command {command!r}{near} There are: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    _set_up_output()
    for library in (
        "httpx",
        "httpx2",
        "datasets",
        "transformers",
        "accelerate",
        "filelock",
        "fsspec",
        "matplotlib",
        "faster_coco_eval",
    ):
        logging.getLogger(library).setLevel(logging.WARNING)
    # Without an accelerator every loader would warn that pinning memory does nothing.
    warnings.filterwarnings("ignore", message=".*pin_memory.*")
    warnings.filterwarnings("ignore", message=".*set_vital.*")  # torchdata, on import
    return _run(command, arguments[1:])


def _run(command: str, words: Sequence[str]) -> int:
    """Runs a command with its words; returns the exit status."""
    try:
        importlib.import_module(f"hf_vlm.cli.{command}").run(words)
    except ValueError as error:
        if os.environ.get("HF_VLM_TRACEBACK"):
            raise
        from hf_vlm.data.io.messages import printable, redact

        print(f"hf-vlm {command}: {printable(redact(str(error)))}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        if not _is_output_closed():
            raise
        return 141  # as of a program that the signal ends: whoever read the output, such as `head`, has enough
    except OSError as error:
        if error.errno not in DISK_ERRORS or os.environ.get("HF_VLM_TRACEBACK"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"hf-vlm {command}: {where}{error.strerror}; {DISK_ERRORS[error.errno]}.", file=sys.stderr)
        return 2
    except SystemExit:  # of a run that was stopped and has saved, on all ranks; or of argparse
        leave_process_group()
        raise
    except KeyboardInterrupt:
        print(f"\nhf-vlm {command}: stopped.{RESUME.get(command, '')}", file=sys.stderr)
        return 130
    finally:
        if "hf_vlm.cli.outputs" in sys.modules:  # commands without outputs start without it
            sys.modules["hf_vlm.cli.outputs"].remove_unused_folders()
    leave_process_group()
    return 0


def _is_output_closed() -> bool:
    """Whether nobody reads the output any more; then what is left of it goes nowhere, and Python ends in silence."""
    try:
        print(flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _set_up_output() -> None:
    """Log entries and text as what they are: names come from data, and may hold codes that act on a terminal.

    What is found in data is shown once, however many of their splits a command opens.
    """
    from hf_vlm.data.io.messages import FindingsOnce, PrintableFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(PrintableFormatter("%(message)s"))
    handler.addFilter(FindingsOnce())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what it cannot encode would end the command
            stream.reconfigure(errors="backslashreplace")


def leave_process_group() -> None:
    """Ends the process group of a launcher: a process that exits while its threads still run may abort."""
    distributed = sys.modules.get("torch.distributed")  # commands that never import torch start at once
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()
