"""`hf-vlm push RUN REPO`"""

import argparse
from collections.abc import Mapping, Sequence

from hf_vlm.cli.options import Parser, add_allow_outside, as_bool, check_positive

TYPES = ("model", "dataset", "space")
ONLY_FOR = {  # options that other types have no use for
    "pictures": "model",
    "examples": "space",
    "splits": "dataset",
    "format": "dataset",
    "num_examples": "dataset",
    "allow_outside": "dataset",
}


def run(argv: Sequence[str]) -> None:
    """Publishes a model, a data set or a Space on the Hub."""
    parser = Parser(
        prog="hf-vlm push",
        description="Publishes on the Hub a run (model, code, image processor, recipe, card) or an export of it; "
        "with --type dataset images and their labels; with --type space a page that shows a model's predictions.",
    )
    parser.add_argument("source", help="folder of a run or an export; with --type dataset any source, as for --data")
    parser.add_argument("repo", help="name on the Hub, such as my-org/my-detector")
    parser.add_argument("--type", choices=TYPES, default="model", help="what to publish; a model by default")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    parser.add_argument("--revision", help="branch to push to")
    parser.add_argument("--message", default="Upload", help="commit message")
    parser.add_argument(
        "--license",
        help="licence of weights or data, for the card (default: apache-2.0 for your own weights, unknown for data)",
    )
    parser.add_argument("--dry_run", action="store_true", help="list what would be sent, and send nothing")
    parser.add_argument(
        "--verify",
        type=as_bool,
        default=True,
        metavar="false",
        help="of a model: whether to load it from the Hub in another process and compare its outputs (default: true)",
    )
    parser.add_argument("--pictures", action="store_true", help="of a run: send pictures that show its data, too")
    parser.add_argument("--examples", nargs="+", help="of a Space: images, folders or wildcards to choose from")
    parser.add_argument("--splits", nargs="+", help="of a data set: names of the splits to send (default: all)")
    parser.add_argument("--format", help="of a data set: its format, guessed when not given")
    parser.add_argument("--num_examples", type=int, help="of a data set: send the first N images of each split only")
    add_allow_outside(parser)
    arguments = parser.parse_args(argv)
    check_positive(arguments, "num_examples")
    for name, only in ONLY_FOR.items():
        if getattr(arguments, name) and arguments.type != only:
            raise ValueError(f"--{name} is for --type {only}, and not for --type {arguments.type}")
    {"model": _push_model, "dataset": _push_dataset, "space": _push_space}[arguments.type](arguments)


def _push_model(arguments: argparse.Namespace) -> None:
    from hf_vlm.deploy.push import push, upload_of
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    if arguments.dry_run:
        upload = upload_of(arguments.source, arguments.repo, license=arguments.license, pictures=arguments.pictures)
        _show(arguments, upload.sizes())
        return
    url = push(
        arguments.source,
        arguments.repo,
        private=arguments.private,
        revision=arguments.revision,
        commit_message=arguments.message,
        license=arguments.license,
        pictures=arguments.pictures,
        verify=arguments.verify,
    )
    print(f"Published at {url}")


def _push_dataset(arguments: argparse.Namespace) -> None:
    from hf_vlm.deploy.hub import Repository
    from hf_vlm.deploy.push_dataset import DatasetPush

    dataset = DatasetPush(
        arguments.source,
        splits=arguments.splits,
        format=arguments.format,
        num_examples=arguments.num_examples,
        allow_outside=arguments.allow_outside,
        license=arguments.license,
    )
    if arguments.dry_run:
        _show(arguments, dataset.measure(arguments.repo))
        return
    repository = Repository(arguments.repo, type="dataset", private=arguments.private, revision=arguments.revision)
    dataset.send(repository, message=arguments.message)
    print(f"Published at {repository.address}")


def _push_space(arguments: argparse.Namespace) -> None:
    from hf_vlm.deploy.hub import Repository
    from hf_vlm.deploy.space import space_upload

    upload = space_upload(
        arguments.source, arguments.repo, license=arguments.license, examples=arguments.examples or ()
    )
    if arguments.dry_run:
        _show(arguments, upload.sizes())
        return
    repository = Repository(arguments.repo, type="space", private=arguments.private, revision=arguments.revision)
    repository.send(upload, message=arguments.message)
    print(f"Published at {repository.address}; the Hub starts it within minutes.")


def _show(arguments: argparse.Namespace, sizes: Mapping[str, int]) -> None:
    """Prints what would be sent."""
    from hf_vlm.deploy.hub import describe_files

    branch = f", branch {arguments.revision}" if arguments.revision else ""
    visibility = "private" if arguments.private else "public"
    print(f"Would be sent to the {arguments.type} repository {arguments.repo} ({visibility}{branch}):")
    print(describe_files(sizes))
