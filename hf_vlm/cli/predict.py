"""`hf-vlm predict RUN photo.jpg --save out.png`"""

import argparse
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_vlm.cli.outputs import is_picture, prepare_file, prepare_picture

BATCH_SIZE = 8


def run(argv: Sequence[str]) -> None:
    """Predicts on images; prints JSON lines, and renders the predictions where asked to."""
    parser = argparse.ArgumentParser(
        prog="hf-vlm predict", description="Objects, classes or segments of images; prints one line of JSON per image."
    )
    parser.add_argument("run", help="folder of a fine-tuned model, or its name on the Hub")
    parser.add_argument("images", nargs="+", help="image files, folders or wildcards")
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score to report, 0 to 1; by default the model's own, which fine-tuning sets to that of the best "
        "F1 (0.5 if it did not), and 0 for models with one class per image or pixel",
    )
    parser.add_argument("--save", type=Path, help="picture to write; a folder where there are several images")
    arguments = parser.parse_args(argv)

    from tqdm.auto import tqdm

    from hf_vlm.data.images import image_paths
    from hf_vlm.deploy.predict import Predictor
    from hf_vlm.training.run import quiet_libraries

    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold}: scores are from 0 to 1")
    quiet_libraries()
    paths = [path for given in arguments.images for path in image_paths(given)]
    pictures = _pictures(paths, arguments.save) if arguments.save is not None else [None] * len(paths)
    predictor = Predictor.from_pretrained(arguments.run)
    unreadable: list[ValueError] = []
    for first in tqdm(range(0, len(paths), BATCH_SIZE), desc="Predicting", leave=False, disable=None):
        batch = slice(first, first + BATCH_SIZE)
        found = _predict(predictor, paths[batch], arguments.threshold, unreadable)
        for prediction, picture in zip(found, pictures[batch], strict=True):
            if prediction is None:
                continue
            print(json.dumps(prediction.to_dict()), flush=True)
            if picture is not None:
                prepare_file(picture)
                prediction.draw().save(picture)
    if unreadable:
        examples = "".join(f"\n  {error}" for error in unreadable[:5])
        raise ValueError(f"{len(unreadable)} of {len(paths)} images could not be read, among them{examples}")


def _predict(predictor: Any, paths: Sequence[str], threshold: float | None, unreadable: list[ValueError]) -> list[Any]:
    """One prediction per image; None for an unreadable one, which is recorded. A single image must be readable."""
    try:
        return list(predictor.predict(paths, threshold))
    except ValueError:
        if len(paths) == 1 and not unreadable:
            raise
    found = []
    for path in paths:
        try:
            found += predictor.predict(path, threshold)
        except ValueError as error:
            unreadable.append(error)
            found.append(None)
    return found


def _pictures(paths: Sequence[str], save: Path) -> list[Path]:
    """Path of the picture of each image: `save` itself, or in that folder as in the images' common folder.

    Raises:
        ValueError: Pillow writes no such file, one file is named for several images, or an image would be overwritten.
    """
    if len(paths) == 1 and save.suffix:
        prepare_picture(save, like="out.png")
        return [save]
    if is_picture(save):
        raise ValueError(f"--save {save}: name a folder, for there are {len(paths)} images")
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    relative = [Path(os.path.relpath(path, common)) for path in absolute]
    stems = Counter(path.with_suffix("") for path in relative)  # a.jpg and a.png get two pictures
    pictures = [
        save / (path.with_name(path.name + ".png") if stems[path.with_suffix("")] > 1 else path.with_suffix(".png"))
        for path in relative
    ]
    if overwritten := {os.path.abspath(path) for path in pictures} & set(absolute):
        raise ValueError(f"--save {save}: {sorted(overwritten)[0]} is one of the images; name another folder")
    return pictures
