"""The report of an evaluation: one page that needs nothing else, and the same as JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from tqdm.auto import tqdm

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.messages import one_line, redact_url, shown_path
from hf_vlm.tasks.evaluation import EvaluatedImage, EvaluatedSplit
from hf_vlm.tasks.reports.parts import Case, Cases, Curves, Histogram, Marks, Matrix, Part, Table
from hf_vlm.training.record import as_json
from hf_vlm.viz.report_cases import CaseImages
from hf_vlm.viz.report_plots import plot_svg
from hf_vlm.viz.sheets import class_color

__all__ = ["render_page", "write_report"]

PAGE, VALUES = "report.html", "report.json"
TEMPLATE = Path(__file__).with_name("report.html.jinja")


def write_report(folder: Path, run: str, split: EvaluatedSplit) -> Path:
    """Write `report.html` and `report.json` into a folder, and return the path of the page.

    The page holds its plots and pictures; it has no script and loads nothing. All text from data is escaped. Images
    are read again from the source, those alone that are shown.

    Args:
        folder: Folder that exists.
        run: Name of the model.
        split: Evaluation on a split.

    Raises:
        ValueError: A file cannot be written, or an image cannot be read any more.
    """
    parts = split.task.report(split.evaluation)
    facts = _facts(run, split)
    positions = {split.images[case.image].position for part in parts for case in getattr(part, "cases", ())}
    images = CaseImages(split.source, sorted(positions))
    bar = tqdm(parts, desc="Report", leave=False, disable=None)
    page = render_page(
        title=one_line(f"Evaluation of {Path(run).name}"),
        facts=facts,
        headline=[(label, _text(split.evaluation.metrics.get(name))) for name, label in _headline(split).items()],
        overview="Metrics",
        values=[(_metric_name(split, name), _text(value)) for name, value in _overall(split).items()],
        parts=[_rendered(part, number, images, split.images) for number, part in enumerate(bar)],
    )
    values = {
        **facts,
        "metrics": split.evaluation.metrics,
        "parts": [_as_values(part, split.images) for part in parts],
    }
    path = folder / PAGE
    try:
        replace_text(folder / VALUES, as_json(values, digits=6) + "\n")
        replace_text(path, page)
    except OSError as error:
        raise ValueError(f"The report cannot be written into {folder}: {error.strerror}.") from error
    return path


def render_page(
    *,
    title: str,
    facts: Mapping[str, str],
    headline: Sequence[tuple[str, str]],
    overview: str,
    values: Sequence[tuple[str, str]],
    parts: Sequence[Mapping[str, Any]],
) -> str:
    """A page of a report; all text is escaped.

    Args:
        facts: What it is about, by name.
        headline: Labels and values shown large.
        overview: Title of the first part, which lists `values`.
        parts: What the template shows of each part.
    """
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(title=title, facts=facts, headline=headline, overview=overview, values=values, parts=parts)


def _facts(run: str, split: EvaluatedSplit) -> dict[str, str]:
    facts = {
        "model": redact_url(run),
        "task": split.task.name,
        "data": split.source.name,
        "split": split.split,
        "images": f"{len(split.images):,}",
        "written": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC by hf_vlm {version('hf_vlm')}",
    }
    return {name: one_line(value) for name, value in facts.items()}


def _headline(split: EvaluatedSplit) -> dict[str, str]:
    return {name: label for name, label in split.task.headline.items() if name in split.evaluation.metrics}


def _overall(split: EvaluatedSplit) -> dict[str, float]:
    return {name: value for name, value in split.evaluation.metrics.items() if "/" not in name}


def _metric_name(split: EvaluatedSplit, name: str) -> str:
    return split.task.metric_names.get(name, name)


def _text(value: Any) -> str:
    """A cell of a table."""
    if value is None or isinstance(value, float):
        return "-" if value is None or math.isnan(value) else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else one_line(value)


def _rendered(part: Part, number: int, images: CaseImages, evaluated: Sequence[EvaluatedImage]) -> dict[str, Any]:
    """What the template shows of a part."""
    shown: dict[str, Any] = {"id": f"part-{number}", "title": part.title, "note": part.note}
    if isinstance(part, Table):
        rows = [[(_text(cell), not isinstance(cell, str)) for cell in row] for row in part.rows]
        return shown | {"type": "table", "columns": part.columns, "rows": rows}
    if isinstance(part, Cases):
        cases = [
            {
                "caption": one_line(case.caption),
                "image": _image_name(evaluated[case.image]),
                "pictures": images.pictures(case, evaluated[case.image].position),
            }
            for case in part.cases
        ]
        return shown | {"type": "cases", "cases": cases, "legend": _legend(part.cases)}
    assert isinstance(part, Curves | Histogram | Matrix)
    return shown | {"type": "plot", "svg": Markup(plot_svg(part, number))}  # matplotlib escapes what it writes


def _image_name(image: EvaluatedImage) -> str:
    return f"image {image.image_id}" + (f", {shown_path(image.path)}" if image.path else "")


def _legend(cases: Sequence[Case]) -> list[tuple[str, str]]:
    """Names and colours of the classes of pixels."""
    names: dict[int, str] = {}
    for case in cases:
        for marks in (case.predicted, case.truth):
            if marks.segmentation is not None:
                names |= dict(zip(marks.class_ids, marks.names))
    return [(one_line(names[index]), "rgb({}, {}, {})".format(*class_color(index))) for index in sorted(names)]


def _as_values(part: Part, evaluated: Sequence[EvaluatedImage]) -> Mapping[str, Any]:
    values = {field.name: getattr(part, field.name) for field in dataclasses.fields(part)}
    return {"type": type(part).__name__.lower(), **{name: _plain(value, evaluated) for name, value in values.items()}}


def _plain(value: Any, evaluated: Sequence[EvaluatedImage]) -> Any:
    """A field of a part as JSON values; of marks all but the pixels."""
    if isinstance(value, Case | Marks):
        names = {field.name for field in dataclasses.fields(value)} - {"segmentation", "ignored"}
        fields = {name: _plain(getattr(value, name), evaluated) for name in sorted(names)}
        if isinstance(value, Case):
            image = evaluated[value.image]
            fields |= {"image": image.position, "image_id": image.image_id, "path": image.path}
        return fields
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: _plain(item, evaluated) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, evaluated) for item in value]
    return value
