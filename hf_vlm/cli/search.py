"""`hf-vlm search "two red sevens" --index features.parquet [--save found.png] [--json found.json]`"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_vlm.cli.options import Parser, add_allow_outside
from hf_vlm.cli.outputs import prepare_file, prepare_picture


def run(argv: Sequence[str]) -> None:
    """Prints the images of an index that are nearest to words or images, and renders them."""
    arguments = _parse(argv)

    import torch

    from hf_vlm.data.io.messages import one_line
    from hf_vlm.features.search import Searcher
    from hf_vlm.training.run import quiet_libraries

    quiet_libraries()
    searcher = Searcher(arguments.index, arguments.model)
    is_image = [Path(query).is_file() for query in arguments.query]
    queries = [
        searcher.embed_images([query]) if of_image else searcher.embed_texts([query])
        for query, of_image in zip(arguments.query, is_image)
    ]
    started = time.perf_counter()
    found = searcher.index.search(torch.cat(queries), arguments.num_results)
    seconds = time.perf_counter() - started
    for query, results in zip(arguments.query, found):
        print(one_line(query))
        for result in results:
            print(f"  {result.similarity:7.4f}  #{result.index}  {one_line(result.path or '')}".rstrip())
    print(f"{len(searcher.index):,} images were searched in {seconds:.3f} s.")
    if arguments.json is not None:
        content = {query: [asdict(result) for result in results] for query, results in zip(arguments.query, found)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n")
    if arguments.save is not None:
        _render(arguments, searcher.index.about, found).save(arguments.save)
        print(f"Images found: {arguments.save}")


def _render(arguments: argparse.Namespace, about: dict[str, Any], found: Any) -> Any:
    """The picture of what was found, whose images are read again from the source that was embedded."""
    from hf_vlm.data.images import images_at
    from hf_vlm.data.sources import open_source
    from hf_vlm.viz.search_sheet import search_sheet

    source = open_source(
        arguments.data or about["data"],
        about["split"],
        format=about.get("format"),
        num_samples=about.get("num_examples"),
        allow_outside=arguments.allow_outside,
        object_masks=False,
    )
    indices = sorted({result.index for results in found for result in results})
    images = dict(zip(indices, images_at(source, indices)))
    return search_sheet(arguments.query, found, images)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        prog="hf-vlm search",
        description="Finds images by words or by an image, among those whose features hf-vlm embed has written. Words "
        "need a model of images and texts.",
    )
    parser.add_argument("query", nargs="+", help="words, or the path of an image; several are searched for one by one")
    parser.add_argument("--index", type=Path, required=True, help="Parquet file that hf-vlm embed has written")
    parser.add_argument("--model", help="folder or Hub name of the model that wrote it; by default as the file says")
    parser.add_argument("--data", help="images, for the picture; by default as the file says")
    add_allow_outside(parser)
    parser.add_argument("--num_results", type=int, default=10, help="number of images to find")
    parser.add_argument("--save", type=Path, help="picture of the images found")
    parser.add_argument("--json", type=Path, help="JSON file for the images found")
    arguments = parser.parse_args(argv)
    if arguments.num_results < 1:
        raise ValueError(f"--num_results {arguments.num_results}: at least 1 is needed")
    if not arguments.index.is_file():
        raise ValueError(f"--index {arguments.index}: there is no such file; hf-vlm embed writes one")
    if arguments.save is not None:
        prepare_picture(arguments.save, like="found.png")
    if arguments.json is not None:
        prepare_file(arguments.json)
    return arguments
