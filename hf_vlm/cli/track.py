"""`hf-vlm track RUN video.mp4 --save out.mp4 --mot out.txt`"""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path

from hf_vlm.cli.options import Parser, add_tiling, check_positive, tiling_of
from hf_vlm.cli.outputs import prepare_file


def run(argv: Sequence[str]) -> None:
    """Tracks the objects of a video; prints JSON lines, and renders the tracks or writes them as files if asked to."""
    arguments = _parser().parse_args(argv)
    check_positive(arguments, "every", "frame_rate")

    from tqdm.auto import tqdm

    from hf_vlm.data.video import VideoWriter, open_video
    from hf_vlm.deploy.mot import mot_rows, write_mot
    from hf_vlm.deploy.prediction_files import prediction_writer
    from hf_vlm.deploy.track import create_tracker, track
    from hf_vlm.training.run import quiet_libraries
    from hf_vlm.viz.tracks import TrackRenderer

    if arguments.threshold is not None and not 0 < arguments.threshold <= 1:
        raise ValueError(f"--threshold {arguments.threshold}: give a score above 0, up to 1")
    tiling_of(arguments)  # before the model is loaded
    video = open_video(arguments.video, every=arguments.every, frame_rate=arguments.frame_rate)
    create_tracker(arguments.tracker)  # before the model is loaded: its package may be missing
    written = [path for path in (arguments.output, arguments.save, arguments.mot) if path is not None]
    is_written = arguments.output is not None or not written
    for path in written:
        prepare_file(path)
    quiet_libraries()
    from hf_vlm.deploy.predict import Predictor

    with contextlib.ExitStack() as stack:
        save = arguments.save
        writer = stack.enter_context(VideoWriter(save, video.frame_rate / video.every)) if save else None
        predictor = Predictor.from_pretrained(arguments.run)
        class_names = [name for _, name in sorted(predictor.model.config.id2label.items())]
        output = arguments.output
        write = stack.enter_context(prediction_writer(arguments.format, output, class_names)) if is_written else None
        bar = stack.enter_context(tqdm(total=video.num_frames, desc="Tracking", leave=False, disable=None))
        renderer, rows, numbers = TrackRenderer(), [], set[int]()
        options = {"tile": arguments.tile, "overlap": arguments.overlap}
        tracked = track(predictor, video, tracker=arguments.tracker, threshold=arguments.threshold, **options)
        for frame, prediction in tracked:
            if write is not None:
                write(prediction, Path(f"{frame.index:06d}"))
            rows.append(mot_rows(prediction, frame.index + 1))
            numbers.update(() if prediction.track_ids is None else prediction.track_ids.tolist())
            if writer is not None:
                writer.write(
                    renderer.render(frame.image, prediction.boxes, prediction.label_names, prediction.track_ids)
                )
            bar.update()
    if arguments.mot is not None:
        write_mot(arguments.mot, rows)
    if written:  # else the tracks are what is printed
        tracks = f"{len(numbers):,} track{'' if len(numbers) == 1 else 's'}"
        print(f"{tracks} in {len(rows):,} frames: {', '.join(map(str, written))}")


def _parser() -> argparse.ArgumentParser:
    from hf_vlm.deploy.track import TRACKERS

    parser = Parser(
        prog="hf-vlm track",
        description="Objects of a video with numbers that stay the same; prints one line of JSON per frame.",
    )
    parser.add_argument("run", help="folder of a fine-tuned detector, or its name on the Hub")
    parser.add_argument("video", help="video file, folder of frames, or sequence of MOTChallenge")
    parser.add_argument("--save", type=Path, help="video to write with boxes, numbers and trails, such as out.mp4")
    parser.add_argument("--mot", type=Path, help="text file to write in the format of MOTChallenge")
    parser.add_argument("--format", choices=("json", "coco"), default="json", help="format of the predictions")
    parser.add_argument("--output", type=Path, help="file for the predictions; printed where no file is named")
    parser.add_argument(
        "--tracker",
        choices=TRACKERS,
        default="appearance",
        help="by what objects are found again: motion, motion and appearance (default), or a method of the package "
        "trackers (the extra hf_vlm[track])",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="score from which a detection may begin a track, up to 1; by default the model's own, else 0.5",
    )
    parser.add_argument("--every", type=int, default=1, help="every how many frames one is looked at")
    parser.add_argument("--frame_rate", type=float, help="frames per second of a folder; by default its own, else 30")
    add_tiling(parser)
    return parser
