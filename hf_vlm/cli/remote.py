"""`--on hub:FLAVOR` of `hf-vlm pretrain`: the run as a job on a machine of the Hub."""

import argparse
from collections.abc import Sequence

from hf_vlm.cli.options import add_bool

__all__ = ["add_remote_options", "run_remote", "split_remote"]


def add_remote_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--on", metavar="hub:FLAVOR", help="run it on a machine of the Hub, such as hub:h200x8")
    parser.add_argument("--job_timeout", default="24h", help="time after which such a job is ended (24h)")
    add_bool(parser, "--submit", help="start the job, which costs money; without it what would run is printed")


def split_remote(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options of `add_remote_options`, and the other words of the command."""
    parser = argparse.ArgumentParser(prog="hf-vlm pretrain", add_help=False, allow_abbrev=False)
    add_remote_options(parser)
    return parser.parse_known_args(list(argv))


def run_remote(options: argparse.Namespace, argv: Sequence[str]) -> None:
    """Prints the job of a recipe, and with `--submit` starts it.

    Raises:
        ValueError: No recipe is named, or the job cannot be run.
    """
    from hf_vlm.cli.recipes import split_recipe
    from hf_vlm.deploy.hub_job import describe_job, plan_job, submit_job
    from hf_vlm.training.recipe import load_recipe

    name, overrides = split_recipe(argv)
    if name is None:
        raise ValueError("--on: name a recipe, such as mae/vit_small.yaml; this machine would be asked for one.")
    job = plan_job(load_recipe(name, overrides), options.on, options.job_timeout)
    print(describe_job(job))
    print(f"Started: {submit_job(job)}" if options.submit else "Nothing is started; --submit true starts it.")
