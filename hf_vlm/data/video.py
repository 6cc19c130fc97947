"""Videos as frames: files that opencv decodes, and folders of images in the order of their numbers."""

import configparser
import contextlib
import logging
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

from hf_vlm.data.formats.folder_files import is_image
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.io.messages import shown_path

__all__ = ["Frame", "Video", "VideoWriter", "is_video", "natural_key", "open_video"]

Array = np.ndarray[Any, Any]

logger = logging.getLogger(__name__)

# By extension, the codec that opencv's wheels write: MPEG-4, VP8 (which browsers play), and a JPEG per frame.
CODECS = {".mp4": "mp4v", ".m4v": "mp4v", ".mov": "mp4v", ".mkv": "mp4v", ".webm": "VP80", ".avi": "MJPG"}
VIDEO_EXTENSIONS = {*CODECS, ".mpg", ".mpeg", ".wmv", ".flv", ".ts"}
DEFAULT_FRAME_RATE = 30.0  # of folders that do not say, and of files that say nonsense
MAX_FRAME_RATE = 1000.0


@dataclass(frozen=True)
class Frame:
    """One image of a video."""

    index: int  # position in the video, from 0
    seconds: float  # since its beginning
    image: Array  # (height, width, 3) uint8 RGB


@dataclass(frozen=True)
class Video:
    """A video that can be iterated over, again and again, frame by frame.

    Attributes:
        path: Its file, or the folder of its frames.
        frame_rate: Frames per second, before any are left out.
        num_frames: Number of frames that an iteration gives; an estimate for files, None where they do not say.
        every: Every how many frames one is given.
        files: The files of the frames in their order; None where the video is one file.
    """

    path: str
    frame_rate: float
    num_frames: int | None
    every: int = 1
    files: tuple[str, ...] | None = None

    def __iter__(self) -> Iterator[Frame]:
        return self._decode_file() if self.files is None else self._decode_files(self.files)

    def _decode_files(self, files: tuple[str, ...]) -> Iterator[Frame]:
        for index in range(0, len(files), self.every):
            yield Frame(index, index / self.frame_rate, decode_image(files[index], num_channels=3)[0])

    def _decode_file(self) -> Iterator[Frame]:
        capture = _open_capture(self.path)
        try:
            index, last = 0, -math.inf
            while capture.grab():  # decodes; converting to RGB is left to the frames that are given
                if index % self.every == 0:
                    seconds = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
                    if not (math.isfinite(seconds) and seconds > last):  # files may lack times
                        seconds = max(index / self.frame_rate, math.nextafter(last, math.inf))
                    decoded, image = capture.retrieve()
                    if decoded and image is not None:
                        last = seconds
                        yield Frame(index, seconds, cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
                index += 1
        finally:
            capture.release()
        expected = 0 if self.num_frames is None else (self.num_frames - 1) * self.every
        if index == 0:
            raise ValueError(f"{shown_path(self.path)} holds no frame that can be decoded")
        if index < 0.9 * expected:
            logger.warning("%s ends after %d of about %d frames", shown_path(self.path), index, expected)


def is_video(path: str | os.PathLike[str]) -> bool:
    """Whether a path ends as a file of a video does."""
    return os.path.splitext(os.fspath(path))[1].lower() in VIDEO_EXTENSIONS


def open_video(path: str | os.PathLike[str], *, every: int = 1, frame_rate: float | None = None) -> Video:
    """A video file, a folder of frames, or a sequence of MOTChallenge (`img1/` with `seqinfo.ini` beside it).

    The images of a folder are frames in natural order: `frame2.jpg` is before `frame10.jpg`.

    Args:
        path: File or folder on disk.
        every: Every how many frames one is given.
        frame_rate: Frames per second of a folder; by default that of its `seqinfo.ini`, else 30.

    Raises:
        ValueError: There is no such file or folder, it is no video, or a folder has no images.
    """
    path = os.fspath(path)
    if every < 1:
        raise ValueError(f"every is {every}; give 1 for all frames, 2 for every second, ...")
    if frame_rate is not None and not 0 < frame_rate <= MAX_FRAME_RATE:
        raise ValueError(f"frame_rate is {frame_rate}; give frames per second, up to {MAX_FRAME_RATE:g}")
    if os.path.isdir(path):
        return _open_folder(Path(path), every, frame_rate)
    if not os.path.isfile(path):
        raise ValueError(f"There is no video at {shown_path(path)}: give a file on disk or a folder of frames.")
    capture = _open_capture(path)
    try:
        rate, count = capture.get(cv2.CAP_PROP_FPS), capture.get(cv2.CAP_PROP_FRAME_COUNT)
        height, width = capture.get(cv2.CAP_PROP_FRAME_HEIGHT), capture.get(cv2.CAP_PROP_FRAME_WIDTH)
    finally:
        capture.release()
    if Image.MAX_IMAGE_PIXELS is not None and height * width > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{shown_path(path)}: its frames of {width:.0f}x{height:.0f} pixels are too large")
    valid_rate = rate if math.isfinite(rate) and 0 < rate <= MAX_FRAME_RATE else DEFAULT_FRAME_RATE
    num_frames = math.ceil(count / every) if math.isfinite(count) and count > 0 else None
    return Video(path, frame_rate or valid_rate, num_frames, every)


def _open_folder(folder: Path, every: int, frame_rate: float | None) -> Video:
    info = folder / "seqinfo.ini"
    images = folder / "img1" if (folder / "img1").is_dir() else folder
    if images == folder and folder.name == "img1":
        info = folder.with_name("seqinfo.ini")
    files = sorted((path for path in images.iterdir() if is_image(path.name)), key=natural_key)
    if not files:
        raise ValueError(f"There are no images in {images}: a video is a file, or a folder of frames.")
    if frame_rate is None:
        frame_rate = _sequence_frame_rate(info)
    return Video(str(folder), frame_rate, math.ceil(len(files) / every), every, tuple(map(str, files)))


def _sequence_frame_rate(info: Path) -> float:
    parser = configparser.ConfigParser(interpolation=None)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error, ValueError, KeyError):
        parser.read(info)
        rate = float(parser["Sequence"]["frameRate"])
        if 0 < rate <= MAX_FRAME_RATE:
            return rate
    return DEFAULT_FRAME_RATE


def natural_key(path: Path) -> list[tuple[int, str]]:
    """A sort key by which numbers within names count as numbers."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [(int(part), "") if number % 2 else (0, part) for number, part in enumerate(parts)]


def _open_capture(path: str) -> Any:
    capture = cv2.VideoCapture(os.path.abspath(path))  # of a plain name opencv might make a camera or a pattern
    if not capture.isOpened():
        raise ValueError(
            f"{shown_path(path)} cannot be read as a video by opencv; its ffmpeg knows mp4, avi, webm ..."
        )
    return capture


class VideoWriter:
    """Writes frames into a video file, which appears under its name when all are written.

    A context manager; `write` takes frames. Nothing is left behind where an error ends it.

    Args:
        path: File whose extension is one of `CODECS`.
        frame_rate: Frames per second.

    Raises:
        ValueError: The extension is another one, frames differ in size, or the file cannot be written.
    """

    def __init__(self, path: Path, frame_rate: float) -> None:
        if path.suffix.lower() not in CODECS:
            raise ValueError(f"{path}: name a video file, with one of the extensions {', '.join(CODECS)}")
        self.path, self.frame_rate = path, frame_rate
        self.partial = path.with_name(f"{path.stem}.tmp{path.suffix}")
        self.writer: Any = None
        self.size: tuple[int, int] | None = None

    def __enter__(self) -> "VideoWriter":
        return self

    def write(self, image: Array | Image.Image) -> None:
        """Append a frame, (height, width, 3) uint8 RGB or a Pillow image, of the size of the first one."""
        array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
        size = array.shape[1], array.shape[0]
        if self.writer is None:
            codec = cv2.VideoWriter.fourcc(*CODECS[self.path.suffix.lower()])
            self.writer, self.size = cv2.VideoWriter(str(self.partial), codec, self.frame_rate, size), size
            if not self.writer.isOpened():
                raise ValueError(f"{self.path} cannot be written: opencv opens no video there")
        if size != self.size:
            raise ValueError(f"{self.path}: frames of a video have one size, but {self.size} and {size} are given")
        self.writer.write(cv2.cvtColor(array, cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: Any, *_: Any) -> None:
        try:
            if self.writer is not None:
                self.writer.release()
            if kind is None and self.writer is not None:
                if not (self.partial.is_file() and self.partial.stat().st_size):
                    raise ValueError(f"{self.path} could not be written; is the disk full?")
                self.partial.replace(self.path)
        finally:
            self.partial.unlink(missing_ok=True)
