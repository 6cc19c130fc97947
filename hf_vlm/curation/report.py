"""The report of a curation: one page with pictures of what was dropped and why, and the same as JSON."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_vlm.curation.measure import REASONS, Reason
from hf_vlm.curation.selection import reasons_of
from hf_vlm.curation.shards import EncodedImage, read_images
from hf_vlm.curation.work import Work
from hf_vlm.data.io.decode import BadImageError
from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.messages import one_line, redact_url, shown_path

__all__ = ["VALUES", "report_path", "write_report"]

Array = np.ndarray[Any, Any]

PAGE, VALUES = "report.html", "report.json"
NUM_SHOWN = 12  # images of each reason
NUM_MEASURED = 64  # shards whose quality is summarised
COPIES = (Reason.EXACT, Reason.NEAR)
NOTES = {
    Reason.UNREADABLE: "No decoder reads them.",
    Reason.SMALL: "The shorter side is below --min_side.",
    Reason.ASPECT: "The longer side is more than --max_aspect times the shorter.",
    Reason.BLANK: "The histogram of grey levels has less than --min_entropy bits.",
    Reason.BLURRED: "The variance of the Laplacian is below --min_sharpness.",
    Reason.EXACT: "Their pixels are those of the image beside them.",
    Reason.NEAR: "Their features and those of the image beside them have a cosine of at least --similarity. Raise it "
    "where pairs differ in what matters.",
    Reason.BALANCE: "Their clusters have more images than --num_images leaves to each.",
}


class Position(NamedTuple):
    """An image of a shard."""

    shard: int
    row: int


def report_path(work: Work, unit: int) -> Path:
    """Path of the page, which is there once all is done."""
    return work.folder / PAGE


def write_report(work: Work, unit: int) -> None:
    """Write `report.html` and `report.json`; images are read again from the shards, those alone that are shown."""
    counts = np.stack([_count(reasons_of(work, shard)) for shard in range(work.num_shards)])  # (shards, reasons)
    dropped = {reason: _spread(work, counts[:, reason], reason) for reason in range(1, len(REASONS))}
    values = _values(work, counts.sum(axis=0)) | {
        "examples": {
            REASONS[reason]: [_pair(work, positions) for positions in found]
            for reason, found in dropped.items()
            if found
        }
    }
    replace_text(work.folder / VALUES, json.dumps(values, indent=1) + "\n")
    replace_text(report_path(work, unit), _page(work, values, dropped))


def _count(reasons: Array) -> Array:
    return np.bincount(reasons, minlength=len(REASONS))


def _spread(work: Work, counts: Array, reason: int) -> list[list[Position]]:
    """Some of the images that were dropped for a reason, spread over the shards, and what each copy is one of."""
    edges, found = np.concatenate([[0], counts.cumsum()]), []
    for index in range(min(NUM_SHOWN, int(edges[-1]))):
        number = index * int(edges[-1]) // min(NUM_SHOWN, int(edges[-1]))
        shard = int(np.searchsorted(edges, number, "right")) - 1
        row = int(np.flatnonzero(reasons_of(work, shard) == reason)[number - edges[shard]])
        positions = [Position(shard, row)]
        if reason in COPIES:
            columns = work.load("decide", shard, "because_shard", "because_row", rows=slice(row, row + 1))
            positions.append(Position(*(int(column[0]) for column in columns)))
        found.append(positions)
    return found


def _pair(work: Work, positions: Sequence[Position]) -> list[dict[str, Any]]:
    return [{"shard": redact_url(work.shards[shard]), "row": row} for shard, row in positions]


def _values(work: Work, counts: Array) -> dict[str, Any]:
    (quotas,) = work.load("balance", 0, "quotas")
    before = sum(work.load("decide", shard, "counts")[0] for shard in range(work.num_shards))
    return {
        "data": work.data,
        "split": work.split,
        "options": dataclasses.asdict(work.options) | {"similarity": work.options.min_similarity},
        "num_images": int(counts.sum()),
        "num_kept": int(counts[0]),
        "dropped": {name: int(count) for name, count in zip(REASONS[1:], counts[1:])},
        "images_per_cluster": _percentiles(np.asarray(before)),
        "kept_per_cluster": _percentiles(quotas.sum(axis=0)),
        **{name: _percentiles(_measured(work, name)) for name in ("entropy", "sharpness")},
    }


def _measured(work: Work, column: str) -> Array:
    """A column of the images that pass, of some shards."""
    num_read = min(NUM_MEASURED, work.num_shards)
    parts = []
    for index in range(num_read):
        values, reason = work.load("measure", index * work.num_shards // num_read, column, "reason")
        parts.append(values[reason == 0])
    return np.concatenate(parts)


def _percentiles(values: Array) -> list[float]:
    """The smallest value, those at 5, 50 and 95 %, and the largest."""
    return [round(float(value), 3) for value in np.percentile(values, [0, 5, 50, 95, 100])]


# ---- page


def _page(work: Work, values: dict[str, Any], dropped: dict[int, list[list[Position]]]) -> str:
    from hf_vlm.viz.report import render_page

    images = _read(work, {position for found in dropped.values() for positions in found for position in positions})
    parts = [
        {
            "id": f"part-{reason}",
            "type": "cases",
            "title": f"{REASONS[reason]}: {values['dropped'][REASONS[reason]]:,}",
            "note": NOTES[reason],
            "legend": [],
            "cases": [_case(work, positions, images) for positions in found],
        }
        for reason, found in dropped.items()
        if found
    ]
    ranges = ("images_per_cluster", "kept_per_cluster", "entropy", "sharpness")
    rows = [(name, f"{count:,}") for name, count in values["dropped"].items()]
    rows += [(f"{name.replace('_', ' ')}: least, 5 %, median, 95 %, most", _range(values[name])) for name in ranges]
    return render_page(
        title=one_line(f"Curation of {work.data}"),
        facts={"data": one_line(work.data), "split": work.split, "shards": f"{work.num_shards:,}"},
        headline=[("images read", f"{values['num_images']:,}"), ("kept", f"{values['num_kept']:,}")],
        overview="Dropped, and what is left",
        values=rows,
        parts=parts,
    )


def _range(values: Sequence[float]) -> str:
    return "  ".join(f"{value:,.6g}" for value in values)


def _case(work: Work, positions: Sequence[Position], images: dict[Position, EncodedImage]) -> dict[str, Any]:
    titles = ("dropped", "copy of") if len(positions) > 1 else ("",)
    pictures = [(title, _picture(images[position].data)) for title, position in zip(titles, positions)]
    names = [f"{redact_url(work.shards[shard]).rpartition('/')[2]}, row {row}" for shard, row in positions]
    name = images[positions[0]].name
    return {
        "caption": one_line(shown_path(name)) if name else "",
        "image": one_line("; ".join(names)),
        "pictures": [(title, url) for title, url in pictures if url],
    }


def _picture(data: bytes) -> str:
    """An image as a URL that holds its data; empty where it cannot be read."""
    from hf_vlm.viz.report_cases import as_url, view_of

    try:
        return as_url(view_of(data, None).picture)
    except BadImageError:
        return ""


def _read(work: Work, positions: set[Position]) -> dict[Position, EncodedImage]:
    rows = defaultdict[int, list[int]](list)
    for shard, row in positions:
        rows[shard].append(row)
    return {
        Position(shard, image.row): image
        for shard, wanted in rows.items()
        for image in read_images(work.shards[shard], work.format, wanted)
    }
