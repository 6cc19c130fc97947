"""`hf-vlm predict RUN photo.jpg --save out.png`"""

import argparse
import contextlib
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_vlm.cli.options import Parser, add_tiling, check_positive, tiling_of
from hf_vlm.cli.outputs import is_picture, prepare_file, prepare_folder, prepare_picture

if TYPE_CHECKING:
    from hf_vlm.deploy.prediction import Prediction
    from hf_vlm.deploy.prediction_files import Write

BATCH_SIZE = 8
COUNTED = ("image", "frame", "object", "label")


def run(argv: Sequence[str]) -> None:
    """Predicts on images and videos; prints JSON lines or writes files, and renders the predictions if asked to."""
    arguments = _parser().parse_args(argv)
    check_positive(arguments, "every")

    from hf_vlm.data.images import image_paths
    from hf_vlm.data.video import is_video, open_video
    from hf_vlm.deploy.prediction_files import output_names, prediction_writer
    from hf_vlm.training.run import quiet_libraries

    if arguments.threshold is not None and not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold}: scores are from 0 to 1")
    tiling_of(arguments)  # before the model is loaded
    quiet_libraries()
    given = [path for word in arguments.images for path in (_listed() if word == "-" else [word])]
    videos = [open_video(path, every=arguments.every) for path in given if is_video(path) and "://" not in path]
    stills = [word for word in given if word not in {video.path for video in videos}]
    paths = [path for word in stills for path in image_paths(word)]
    names = output_names([*paths, *(video.path for video in videos)])
    pictures = _pictures(paths, names, arguments.save, has_videos=bool(videos))
    if arguments.output is not None:
        (prepare_folder if arguments.format == "yolo" else prepare_file)(arguments.output)
    predictor = _load(arguments.run)
    class_names = [name for _, name in sorted(predictor.model.config.id2label.items())]
    with prediction_writer(arguments.format, arguments.output, class_names) as write:
        predict = _Predict(predictor, arguments, write)
        unreadable = predict.images(paths, names[: len(paths)], pictures)
        for video, name in zip(videos, names[len(paths) :], strict=True):
            predict.video(video, name, _video_file(arguments.save, name, is_alone=len(names) == 1))
    if why := predict.why_nothing():
        print(why, file=sys.stderr)
    if arguments.output is not None:  # else predictions are what is printed
        print(f"{predict.summary()}: {', '.join(map(str, filter(None, (arguments.output, arguments.save))))}")
    if unreadable:
        examples = "".join(f"\n  {error}" for error in unreadable[:5])
        raise ValueError(f"{len(unreadable)} of {len(paths)} images could not be read, among them{examples}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="hf-vlm predict",
        description="Objects, classes or segments of images and of the frames of videos; prints one line of JSON per "
        "image, or writes COCO or YOLO. Goes on after images that cannot be read, names them and ends with status 2.",
    )
    parser.add_argument("run", help="folder of a fine-tuned model, or its name on the Hub")
    parser.add_argument(
        "images", nargs="+", help="image files, folders, wildcards, http(s) URLs, videos, or - for a list on stdin"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="lowest score to report, 0 to 1; by default the model's own, which fine-tuning sets to that of the best "
        "F1 (0.5 if it did not), and 0 for models with one class per image or pixel",
    )
    parser.add_argument(
        "--save", type=Path, help="picture or video to write; a folder where there are several images or videos"
    )
    parser.add_argument("--format", choices=("json", "coco", "yolo"), default="json", help="format of the predictions")
    parser.add_argument(
        "--output", type=Path, help="file for the predictions, of YOLO a folder; by default they are printed"
    )
    add_tiling(parser)
    parser.add_argument("--every", type=int, default=1, help="of videos, every how many frames one is looked at")
    return parser


def _listed() -> list[str]:
    """The paths and URLs on the standard input, one per line."""
    return [line for line in (line.strip() for line in sys.stdin) if line]


def _load(run: str) -> Any:
    from hf_vlm.deploy.predict import Predictor

    return Predictor.from_pretrained(run)


class _Predict:
    """What is done with each image and video."""

    def __init__(self, predictor: Any, arguments: argparse.Namespace, write: "Write") -> None:
        self.predictor, self._write = predictor, write
        self.options = {"threshold": arguments.threshold, "tile": arguments.tile, "overlap": arguments.overlap}
        self.first_images: list[Any] = []
        self.counts: Counter[str] = Counter()

    def write(self, prediction: "Prediction", name: Path, image: Any) -> None:
        """Writes the prediction on an image, and counts what it holds."""
        self._write(prediction, name)
        if len(self.first_images) < BATCH_SIZE:
            self.first_images.append(image)
        self.counts["image" if prediction.frame is None else "frame"] += 1
        self.counts["label" if prediction.boxes is None else "object"] += len(prediction)

    def summary(self) -> str:
        """How many images were looked at, and what they hold."""
        counts = [(what, self.counts[what]) for what in COUNTED if what in self.counts]
        return ", ".join(f"{number:,} {what}{'' if number == 1 else 's'}" for what, number in counts)

    def why_nothing(self) -> str:
        """The threshold, the highest score of the first images, and what to type; empty where something was found."""
        if not self.first_images or self.counts["object"] or self.counts["label"]:
            return ""
        threshold = self.predictor.score_threshold if self.options["threshold"] is None else self.options["threshold"]
        found = self.predictor.predict(self.first_images, **self.options | {"threshold": 0.0})
        best = max((float(score) for prediction in found for score in prediction.scores), default=0.0)
        num_seen = self.counts["image"] + self.counts["frame"]
        where = "" if num_seen <= BATCH_SIZE else f" in the first {BATCH_SIZE}"
        return (
            f"Nothing was found: the score threshold is {threshold:.4g}, and the highest score{where} {best:.4f}. "
            f"Lower the threshold: --threshold {math.floor(100 * best) / 100:g}"
        )

    def images(self, paths: Sequence[str], names: Sequence[Path], pictures: Sequence[Path | None]) -> list[ValueError]:
        """Predicts on images; returns the errors of those that cannot be read."""
        from tqdm.auto import tqdm

        unreadable: list[ValueError] = []
        for first in tqdm(range(0, len(paths), BATCH_SIZE), desc="Predicting", leave=False, disable=None):
            batch = slice(first, first + BATCH_SIZE)
            found = zip(paths[batch], self._batch(paths[batch], unreadable), strict=True)
            for (path, prediction), name, picture in zip(found, names[batch], pictures[batch], strict=True):
                if prediction is None:
                    continue
                self.write(prediction, name, path)
                if picture is not None:
                    prepare_file(picture)
                    prediction.draw().save(picture)
        return unreadable

    def _batch(self, paths: Sequence[str], unreadable: list[ValueError]) -> list[Any]:
        """One prediction per image; None for an unreadable one, which is recorded. A single one must be readable."""
        try:
            return list(self.predictor.predict(paths, **self.options))
        except ValueError:
            if len(paths) == 1 and not unreadable:
                raise
        found = []
        for path in paths:
            try:
                found += self.predictor.predict(path, **self.options)
            except ValueError as error:
                unreadable.append(error)
                found.append(None)
        return found

    def video(self, video: Any, name: Path, file: Path | None) -> None:
        """Predicts on the frames of a video, and renders them into a file."""
        from tqdm.auto import tqdm

        from hf_vlm.data.video import VideoWriter

        with contextlib.ExitStack() as stack:
            writer = None
            if file is not None:
                prepare_file(file)
                writer = stack.enter_context(VideoWriter(file, video.frame_rate / video.every))
            bar = stack.enter_context(tqdm(total=video.num_frames, desc=video.path, leave=False, disable=None))
            for frame, prediction in self._frames(video):
                self.write(prediction, name.with_name(f"{name.name}-{frame.index:06d}"), frame.image)
                if writer is not None:
                    writer.write(prediction.draw(frame.image))
                bar.update()

    def _frames(self, video: Any) -> Iterator[tuple[Any, Any]]:
        return self.predictor.predict_video(video, batch_size=BATCH_SIZE, **self.options)  # type: ignore[no-any-return]


def _pictures(
    paths: Sequence[str], names: Sequence[Path], save: Path | None, *, has_videos: bool
) -> Sequence[Path | None]:
    """Path of the picture of each image: `save` itself, or in that folder; none where nothing is saved.

    Raises:
        ValueError: Pillow writes no such file, one file is named for several images, or an image would be overwritten.
    """
    if save is None:
        return [None] * len(paths)
    if len(paths) == 1 and save.suffix and not has_videos:
        prepare_picture(save, like="out.png")
        return [save]
    if is_picture(save):
        raise ValueError(f"--save {save}: name a folder, for there are {len(paths)} images")
    pictures = [save / name.with_name(f"{name.name}.png") for name in names[: len(paths)]]
    absolute = {os.path.abspath(path) for path in paths}
    if overwritten := {os.path.abspath(path) for path in pictures} & absolute:
        raise ValueError(f"--save {save}: {sorted(overwritten)[0]} is one of the images; name another folder")
    return pictures


def _video_file(save: Path | None, name: Path, *, is_alone: bool) -> Path | None:
    """The file that a video is rendered into: `save` itself, or in that folder."""
    from hf_vlm.data.video import is_video

    if save is None or (is_alone and is_video(save)):
        return save
    if save.suffix and not save.is_dir():
        raise ValueError(f"--save {save}: name a folder, or for a single video a file such as out.mp4")
    return save / name.with_name(f"{name.name}.mp4")
