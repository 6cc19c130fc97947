"""Origins of a model's weights, and the values of a run that may be published."""

import json
import re
from pathlib import Path
from typing import Any

from hf_vlm.data.io.messages import redact_url

__all__ = ["RUN_FILE", "is_hub_id", "origins_of", "publishable", "recorded_origins", "write_origins"]

RUN_FILE = "run.json"


def publishable(value: Any) -> Any:
    """A value of a recipe as it may be published with the model.

    URLs lose password and query; an absolute path becomes relative to the working folder, or else its last part: the
    folders above it are private. A path that looks like a name on the Hub gets a `./` before it.
    """
    if isinstance(value, dict):
        shown: dict[Any, Any] = {}
        for name, item in value.items():
            key = plain = publishable(name)
            number = 1
            while key in shown:  # other folders may have the same last part
                number += 1
                key = f"{plain} ({number})"
            shown[key] = publishable(item)
        return shown
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and Path(value).is_absolute()):
        path = Path(value)
        return f"./{path.relative_to(Path.cwd())}" if path.is_relative_to(Path.cwd()) else path.name or str(path)
    if not isinstance(value, str):
        return value
    return f"./{value}" if re.match(r"\w.*/", value) and Path(value).exists() else redact_url(value)


def origins_of(source: str | None) -> list[str]:
    """Models of others that a model was trained from: names on the Hub, or of folders without a record.

    Args:
        source: Hub id or folder of a model, which may be a run's or written by `hf-vlm convert`; None for no model.
    """
    if not source:
        return []
    folder = Path(source)
    if not folder.is_dir():
        return [source]
    record = folder / RUN_FILE
    return recorded_origins(json.loads(record.read_text())) if record.is_file() else [folder.resolve().name]


def recorded_origins(run: dict[str, Any]) -> list[str]:
    """The origins in the record of a run; records of earlier versions hold the encoder only."""
    encoder = run.get("encoder")
    return list(run.get("origins", [encoder] if encoder and is_hub_id(encoder) else []))


def is_hub_id(name: str) -> bool:
    """Whether a name is that of a model or data set on the Hub, and not of a local folder."""
    return re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) is not None and not Path(name).exists()


def write_origins(folder: Path, source: str) -> None:
    """Writes into the folder of a converted model where its weights came from."""
    (folder / RUN_FILE).write_text(json.dumps({"origins": origins_of(source)}) + "\n")
