"""The card of an exported model: how to run it with and without torch, and what the gate measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCardData

from hf_vlm.data.io.durable import replace_text
from hf_vlm.data.io.parsing import parse_json
from hf_vlm.deploy.markdown import markdown
from hf_vlm.deploy.model_card import render_card
from hf_vlm.training.provenance import RUN_FILE, recorded_origins

__all__ = ["PARITY_FILE", "PREDICT_FILE", "RUNTIMES", "parity_rows", "write_exported_card"]

PARITY_FILE = "parity.json"
PREDICT_FILE = "predict.py"
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}  # what `predict.py` needs
LIBRARIES = {"onnx": "onnx", "openvino": "openvino", "torch": "pytorch", "executorch": "executorch"}  # as on the Hub


def parity_rows(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What the gate measured, as rows of a table: names and values."""
    rows = [
        ("size", f"{record['megabytes']:.1f} MB"),
        ("images compared", str(record["num_images"])),
        ("largest difference of outputs", f"{record['max_difference']:.1e}"),
        ("agreement of predictions", f"{record['agreement']:.3f}"),
        ("milliseconds per image, torch", f"{record['ms_before']:.1f}"),
        ("milliseconds per image, exported", f"{record['ms_after']:.1f}"),
        ("speed-up", f"{record['speed_up']:.2f}"),
    ]
    if metric := record.get("metric"):
        rows += [(f"{metric['name']}, torch", f"{metric['before']:.4f}")]
        rows += [(f"{metric['name']}, exported", f"{metric['after']:.4f}")]
    return rows


def write_exported_card(folder: Path, *, name: str, run: str | Path, record: dict[str, Any]) -> None:
    """Writes `README.md` into the folder of an export.

    Args:
        name: Name of the folder, as users will see it.
        run: Folder of the model that was exported, or its name on the Hub.
        record: What `parity.json` holds.
    """
    from hf_vlm.features.export_formats import FORMATS  # imports torch, which pushing an export should not cost

    config, processor = (
        json.loads((folder / file).read_text(encoding="utf-8")) for file in ("config.json", "preprocessor_config.json")
    )
    hint = "bf16" if record["precision"] == "bf16" else "f32"  # OpenVINO would choose by the processor
    is_local = Path(run).is_dir()
    metadata = ModelCardData(
        model_name=name,
        library_name=LIBRARIES[record["format"]],
        pipeline_tag=record["task"],
        license=_license(Path(run)) if is_local else None,
        base_model=None if is_local else str(run),
        tags=["hf_vlm", "vision-transformer", "transformers-export"],
    )
    largest_batch = FORMATS[record["format"]].largest_batch
    runtime = RUNTIMES[record["format"]] if (folder / PREDICT_FILE).is_file() else None
    values = {
        "card_data": metadata.to_yaml(),
        "model_name": markdown(name),
        "model_path": json.dumps(f"./{name}", ensure_ascii=False)[1:-1],
        "run": Path(run).resolve().name if is_local else str(run),
        "record": record,
        "rows": [(markdown(key), value) for key, value in parity_rows(record)],
        "runtime": runtime,
        "class_names": [markdown(label) for _, label in config.get("id2label", {}).items()],
        "options": f', config={{"INFERENCE_PRECISION_HINT": "{hint}"}}' if record["format"] == "openvino" else "",
        "is_encoder": record["task"] == "image-feature-extraction",
        "processor": processor,
        "in_browser": runtime == "onnxruntime" and _is_plain(processor),
        "batch_size": "any size" if largest_batch is None else f"up to {largest_batch} images",
        "image_size": f"{processor['size']['height']} x {processor['size']['width']}",
    }
    replace_text(folder / "README.md", render_card("exported.md", values))


def _is_plain(processor: dict[str, Any]) -> bool:
    """Whether images are colour images that are resized, rescaled and normalised per channel, and nothing else."""
    steps = not processor.get("do_pad") and all(processor[f"do_{step}"] for step in ("resize", "rescale", "normalize"))
    return steps and all(np.shape(processor[f"image_{name}"]) == (3,) for name in ("mean", "std"))


def _license(run: Path) -> str | None:
    """The licence of a run's weights, as its own card has it; None where others' terms decide."""
    path = run / RUN_FILE
    if not path.is_file():
        return None
    return None if recorded_origins(parse_json(path.read_text(encoding="utf-8"))) else "apache-2.0"
