"""`hf-vlm embed RUN --data SOURCE [--save features.parquet] [--neighbors neighbors.png] [--maps maps.png]`"""

import argparse
import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_vlm.cli.data import images_to_read
from hf_vlm.cli.options import Parser, add_allow_outside, check_positive
from hf_vlm.cli.outputs import prepare_file, prepare_picture


def run(argv: Sequence[str]) -> None:
    """Writes the features of images, and renders their nearest neighbours and maps of their patches."""
    arguments = _parse(argv)

    from hf_vlm.data.images import first_images, images_at
    from hf_vlm.data.sources import guess_format, open_source
    from hf_vlm.features.device import to_best_device
    from hf_vlm.features.neighbors import evenly_spaced_in_file
    from hf_vlm.features.search import load_embedder
    from hf_vlm.training.run import quiet_libraries
    from hf_vlm.viz.map_sheet import plot_feature_maps
    from hf_vlm.viz.neighbor_sheet import plot_stored_neighbors

    quiet_libraries()
    model, processor, arguments.pooling = load_embedder(arguments.run, arguments.pooling)
    to_best_device(model)
    encoder = getattr(model, "backbone", model)
    format = arguments.format or guess_format(arguments.data)
    num_examples = images_to_read(format, arguments.num_examples)
    source = open_source(
        arguments.data,
        arguments.split,
        format=format,
        num_samples=num_examples,
        allow_outside=arguments.allow_outside,
        object_masks=False,
    )
    queries = arguments.queries
    if queries and num_examples is not None and max(queries) >= num_examples:
        raise ValueError(f"--queries {max(queries)}: only {num_examples} images are read, numbered from 0 on")
    with _feature_path(arguments) as path:
        if path is not None:
            _write_features(path, model, processor, source, arguments, num_expected=num_examples)
            queries = queries or evenly_spaced_in_file(path, arguments.num_queries)
        if path is not None and arguments.neighbors is not None:
            picture = plot_stored_neighbors(path, source, queries, num_neighbors=arguments.num_neighbors)
            picture.save(arguments.neighbors)
            print(f"Nearest neighbours: {arguments.neighbors}")
    if arguments.maps is not None:
        num_channels = encoder.config.num_channels
        if queries:
            images = images_at(source, queries, num_channels=num_channels)
        else:
            images = first_images(source, arguments.num_queries, num_channels=num_channels)
        picture = plot_feature_maps(encoder, images, processor, patch=arguments.patch, foreground=arguments.foreground)
        picture.save(arguments.maps)
        print(f"Feature maps:       {arguments.maps}")


def _write_features(
    path: Path, encoder: Any, processor: Any, source: Any, arguments: argparse.Namespace, *, num_expected: int | None
) -> None:
    """Writes the features; prints their number and, where the file is kept, its path."""
    from hf_vlm.data.io.messages import redact_url
    from hf_vlm.features.extraction import feature_size, write_features

    num_written, num_bad = write_features(
        path,
        encoder,
        processor,
        source,
        pooling=arguments.pooling,
        batch_size=arguments.batch_size,
        max_bad_fraction=arguments.max_bad_fraction,
        about={
            "encoder": redact_url(arguments.run),
            "data": redact_url(arguments.data),
            "split": arguments.split,
            "format": arguments.format,
            "num_examples": num_expected,
        },
        num_expected=num_expected,
    )
    skipped = f"; {num_bad:,} could not be read and were skipped" if num_bad else ""
    print(f"{num_written:,} images, {feature_size(encoder, arguments.pooling)} features each{skipped}")
    if arguments.save is not None:
        print(f"Features:           {path}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="hf-vlm embed",
        description="Writes the features of all images of a source to Parquet, one row per image. Renders "
        "images beside their nearest neighbours, and maps of their patches: principal components as colours, "
        "attention of the class token. Writes features.parquet when no output is named.",
    )
    parser.add_argument("run", help="folder of an encoder or of a model that contains one, or its name on the Hub")
    parser.add_argument("--data", required=True, help="images: folder, file, Hub id or scenes")
    parser.add_argument("--format", help="format of the source, guessed when not given")
    add_allow_outside(parser)
    parser.add_argument("--split", default="train")
    parser.add_argument("--num_examples", type=int, help="use the first N images, or N spread over class folders")
    parser.add_argument("--save", type=Path, help="Parquet file for the features")
    parser.add_argument("--neighbors", type=Path, help="picture of images and their nearest neighbours")
    parser.add_argument("--maps", type=Path, help="picture of images and maps of their patches")
    parser.add_argument("--queries", help="indices of images to show, from 0, such as 3,17; default: evenly spaced")
    parser.add_argument("--num_queries", type=int, default=6, help="number of images to show")
    parser.add_argument("--num_neighbors", type=int, default=8, help="number of neighbours per image")
    parser.add_argument("--foreground", action="store_true", help="leave the background of the components black")
    parser.add_argument("--patch", help="row,column of a patch: maps of similarity to it, instead of attention")
    parser.add_argument(
        "--pooling",
        help="features: mean of the patch tokens (default), class token, both, or shared: those that are "
        "compared with texts (default of models that have them)",
    )
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_bad_fraction", type=float, default=0.01, help="fraction of unreadable images to accept")
    arguments = parser.parse_args(argv)
    _check(arguments)
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """ValueError for options that are wrong, before any work is done."""
    if arguments.save is None and arguments.neighbors is None and arguments.maps is None:
        arguments.save = Path("features.parquet")
    if arguments.save is not None:
        prepare_file(arguments.save)
    for option in ("neighbors", "maps"):
        if (picture := getattr(arguments, option)) is not None:
            prepare_picture(picture, like=f"{option}.png", option=f"--{option}")
    check_positive(arguments, "num_examples", "num_queries", "num_neighbors", "batch_size")
    arguments.queries = _numbers("--queries", arguments.queries)
    arguments.patch = _numbers("--patch", arguments.patch)
    if arguments.patch is not None and len(arguments.patch) != 2:
        raise ValueError("--patch: give a row and a column, such as 3,5")


def _numbers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"{option} {text}: give numbers from 0, separated by commas, such as 3,17")
    return tuple(int(part) for part in parts)


@contextlib.contextmanager
def _feature_path(arguments: argparse.Namespace) -> Iterator[Path | None]:
    """Path of the features: as given, or temporary if only the picture of neighbours needs them, or none."""
    if arguments.save is not None or arguments.neighbors is None:
        yield arguments.save
        return
    with tempfile.TemporaryDirectory(dir=arguments.neighbors.parent, prefix=".features_") as folder:
        yield Path(folder, "features.parquet")
