"""The handler of an inference endpoint for this model, with the model's own code from this repository.

https://huggingface.co/docs/inference-endpoints/guides/custom_handler
"""

import base64
import binascii
import io
from typing import Any

from PIL import Image, ImageOps
from transformers import pipeline

TASK = "{{ task }}"


class EndpointHandler:
    """Answers requests with what the pipeline of the model's task returns, its masks as base64 of PNG."""

    def __init__(self, path: str = "") -> None:
        self.pipeline = pipeline(TASK, model=path, trust_remote_code=True)

    def __call__(self, data: dict[str, Any]) -> Any:
        """Answers `{"inputs": image as bytes, base64 or Pillow image, "parameters": {"threshold": 0.3}}`."""
        try:
            parameters = data.get("parameters") or {}
            threshold = parameters.get("threshold", 0.0)
            if not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
                raise ValueError(f"threshold is {threshold!r}; scores are from 0 to 1")
            return as_json(self.pipeline(read_image(data.get("inputs")), **parameters))
        except (ValueError, TypeError) as error:
            return {"error": str(error)}


def read_image(inputs: Any) -> Image.Image:
    """The image of a request; a text is base64 alone, never a path or an address to read from."""
    try:
        if isinstance(inputs, str):
            inputs = base64.b64decode(inputs.rpartition("base64,")[2], validate=True)
        image = Image.open(io.BytesIO(inputs)) if isinstance(inputs, bytes) else inputs
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, AttributeError, binascii.Error, Image.DecompressionBombError) as error:
        raise ValueError(f"inputs must be an image: its bytes, or these in base64 ({error})") from error


def as_json(value: Any) -> Any:
    """A result of a pipeline without Pillow images."""
    if isinstance(value, dict):
        return {name: as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, Image.Image):
        file = io.BytesIO()
        value.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()
    return value
