"""`hf-vlm push RUN REPO`"""

import argparse
from collections.abc import Sequence


def run(argv: Sequence[str]) -> None:
    """Publishes a run on the Hub."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm push", description="Publishes model, code, image processor, recipe and card of a run on the Hub."
    )
    parser.add_argument("run", help="folder of a run")
    parser.add_argument("repo", help="name on the Hub, such as my-org/my-detector")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload model", help="commit message")
    parser.add_argument(
        "--license", help="licence of the weights, for the card (default for your own weights: apache-2.0)"
    )
    arguments = parser.parse_args(argv)

    from hf_vlm.deploy.push import push

    url = push(
        arguments.run,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.message,
        license=arguments.license,
    )
    print(f"Published at {url}")
