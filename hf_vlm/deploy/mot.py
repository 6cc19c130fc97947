"""Tracks as text in the format of MOTChallenge: frame, id, x, y, width, height, score, and three more columns."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.messages import shown_path
from hf_vlm.deploy.prediction import Prediction

__all__ = ["mot_rows", "read_mot", "write_mot"]

MIN_COLUMNS, NUM_COLUMNS = 6, 9


def mot_rows(prediction: Prediction, frame: int) -> NDArray[np.float64]:
    """Rows (n, 9) of a tracked frame, as of `write_mot`: `frame` from 1; class and visibility are not known."""
    assert prediction.boxes is not None
    assert prediction.track_ids is not None
    corners = prediction.boxes.astype(np.float64)
    columns: list[Any] = [np.full(len(prediction), frame), prediction.track_ids]
    columns += [*corners[:, :2].T, *(corners[:, 2:] - corners[:, :2]).T, prediction.scores]
    columns += [np.full(len(prediction), -1.0)] * 2
    return np.stack(columns, axis=1).astype(np.float64)


def write_mot(path: Path, rows: Iterable[NDArray[np.float64]]) -> None:
    """Write rows (n, 9): frame and id from 1, x, y, width, height in pixels, score, class, visibility.

    In files of truth the score is 1, or 0 for boxes that are to be ignored, and the class counts from 1; in files of
    results class and visibility are -1.
    """
    lines = [
        f"{int(row[0])},{int(row[1])},{','.join(f'{value:.3f}' for value in row[2:6])},{row[6]:.6g},{int(row[7])},"
        f"{row[8]:.6g}" + (",-1" if row[8] == -1 else "") + "\n"
        for block in rows
        for row in block
    ]
    replace_text(path, "".join(lines))


def read_mot(path: Path) -> NDArray[np.float64]:
    """The rows (n, 9) of a file, as of `write_mot`, by frame; missing columns are 1 for the score, else -1.

    Raises:
        ValueError: The file cannot be read, or a line has other than numbers, too few, or a frame below 1.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown_path(path)} cannot be read as a file of tracks: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            values = [float(cell) for cell in line.strip().rstrip(",").replace(";", ",").split(",")]
        except ValueError:
            values = []
        if len(values) < MIN_COLUMNS or not all(map(math.isfinite, values)) or values[0] < 1:
            raise ValueError(
                f"{shown_path(path)}, line {number}: a track is `frame,id,x,y,width,height,score,...` in numbers, "
                "frames from 1"
            )
        missing = [1.0, -1.0, -1.0][len(values) - MIN_COLUMNS :] if len(values) < NUM_COLUMNS else []
        rows.append([*values, *missing][:NUM_COLUMNS])
    found = np.array(rows, dtype=np.float64).reshape(-1, NUM_COLUMNS)
    return found[np.argsort(found[:, 0], kind="stable")]
