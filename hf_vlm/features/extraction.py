"""Features of frozen encoders: pooled, and written to Parquet while a stream is read."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.io.durable import replaced_file
from hf_vlm.data.io.messages import redact_url
from hf_vlm.data.source import Source
from hf_vlm.data.stream import ExampleStream, Transform
from hf_vlm.data.transforms.views import EvalTransform
from hf_vlm.models.image_processing_vlm_vit import VLMViTImageProcessor

__all__ = [
    "METADATA_KEY",
    "POOLINGS",
    "SHARED",
    "encode",
    "eval_transform_for",
    "feature_size",
    "frozen",
    "weights_fingerprint",
    "write_features",
]

SHARED = "shared"
POOLINGS = ("mean", "class", "both", SHARED)
METADATA_KEY = b"hf_vlm"  # in the Parquet file: which encoder made the features, from which data
# Settings that EvalTransform cannot change.
FIXED_PROCESSOR_FIELDS = ("resample", "do_rescale", "rescale_factor", "do_normalize", "do_pad")
ROWS_PER_GROUP = 4096  # held in memory: 25 MB of 1,536 features


@contextmanager
def frozen(encoder: Any) -> Iterator[Any]:
    """The encoder in evaluation mode without gradients; the modes of its modules are restored afterwards."""
    modes = {part: part.training for part in encoder.modules()}
    encoder.eval()
    try:
        with torch.no_grad():  # a sharded encoder gathers its weights, which inference mode does not allow
            yield encoder
    finally:
        for part, is_training in modes.items():
            part.training = is_training


def encode(encoder: Any, pixel_values: Tensor, *, pooling: str = "mean") -> Tensor:
    """Features (batch, features) float32, on the CPU, of images (batch, channels, height, width).

    Args:
        encoder: Encoder on any device; for "shared" a model of images and texts.
        pooling: "mean" of the patch tokens, which every encoder has; the "class" token, which is what image-level
            methods train (SimCLR, MoCo v3, LeJEPA, DINOv2); or "both", the class token followed by the mean, as in
            DINOv2's linear classifiers: twice as many features; or "shared", the space in which a model of images and
            texts compares them.

    Raises:
        ValueError: There is no such pooling, or the encoder has no class token, or shares no space with texts.
    """
    if pooling not in POOLINGS:
        raise ValueError(f"There is no pooling {pooling!r}. There are: {', '.join(POOLINGS)}.")
    if pooling == SHARED:
        if not hasattr(encoder, "get_image_features"):
            raise ValueError(
                f"The pooling {SHARED!r} needs a model of images and texts, and this is an encoder alone."
            )
        with frozen(encoder):
            return encoder.get_image_features(pixel_values.to(encoder.device)).cpu()  # type: ignore[no-any-return]
    if pooling != "mean" and not encoder.config.use_class_token:
        raise ValueError("The encoder has no class token to take features from: use the pooling 'mean'.")
    with frozen(encoder):
        output = encoder(pixel_values=pixel_values.to(encoder.device), class_token_only=pooling == "class")
        tokens = output.last_hidden_state  # (batch, prefix + patches or 1, hidden_size)
        parts = [tokens[:, 0]] if pooling != "mean" else []
        if pooling != "class":
            parts.append(tokens[:, encoder.config.num_prefix_tokens :].mean(dim=1))
        return torch.cat(parts, dim=1).float().cpu()


def feature_size(encoder: Any, pooling: str) -> int:
    """Number of features of an image with this pooling."""
    if pooling == SHARED:
        return encoder.config.projection_size  # type: ignore[no-any-return]
    return encoder.config.hidden_size * (2 if pooling == "both" else 1)


def eval_transform_for(processor: VLMViTImageProcessor) -> Transform:
    """The transform that prepares images of a stream as an image processor does."""
    size, num_channels = (processor.size["height"], processor.size["width"]), processor.num_channels
    defaults = VLMViTImageProcessor()
    if any(getattr(processor, name) != getattr(defaults, name) for name in FIXED_PROCESSOR_FIELDS):
        return ProcessorTransform(processor, size, num_channels)
    return EvalTransform(  # several times as fast
        size, image_mean=processor.image_mean, image_std=processor.image_std, num_channels=num_channels
    )


class ProcessorTransform:
    """A transform by an image processor with any settings, such as those of converted encoders."""

    def __init__(self, processor: VLMViTImageProcessor, size: tuple[int, int], num_channels: int) -> None:
        self.processor, self.size, self.num_channels = processor, size, num_channels

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        image, _ = decode_image(example["image"], num_channels=self.num_channels, at_least=self.size)
        processed = self.processor(image, return_tensors="pt", input_data_format="channels_last")
        transformed = {"pixel_values": processed["pixel_values"][0]}
        return {**transformed, "label": example["label"]} if "label" in example else transformed


def write_features(
    path: Path,
    encoder: Any,
    processor: VLMViTImageProcessor,
    source: Source,
    *,
    pooling: str = "mean",
    batch_size: int = 64,
    max_bad_fraction: float = 0.01,
    about: dict[str, Any] | None = None,
    num_expected: int | None = None,
) -> tuple[int, int]:
    """Write the features of all images of a source to a Parquet file, one row per image, in its order.

    The columns are `index` (the position in the source, from 0), `image_id`, `path` (null where images have none),
    `label` where the source has it, and `features` (hidden_size) float32. The metadata of the file name the encoder,
    as JSON under the key `hf_vlm`. Rows are written in groups, so that memory does not grow with their number, and to
    a temporary file, which is renamed when it is complete.

    Args:
        path: Parquet file to write.
        source: Images.
        pooling: Pooling of the patch tokens; see `encode`.
        max_bad_fraction: Fraction of unreadable images to accept; see `ExampleStream`.
        about: JSON values to add to the metadata.
        num_expected: Images of the source, for the progress bar.

    Returns:
        Number of images written, and number of unreadable images skipped.

    Raises:
        ValueError: The path cannot be written, the source gives no image or too many that cannot be read, a feature
            is not finite, or the encoder has no such pooling.
    """
    stream = ExampleStream(
        with_index(source.dataset),
        WithMetadata(eval_transform_for(processor)),
        shuffle=False,
        repeat=False,
        block_size=batch_size,  # nothing is shuffled: a larger block would only take memory
        max_bad_fraction=max_bad_fraction,
    )
    schema = _schema(source.features, encoder, processor, {"pooling": pooling, **(about or {})})
    num_written = 0
    with replaced_file(path) as file, pq.ParquetWriter(file, schema, use_dictionary=["path"]) as writer:
        batches = []
        with tqdm(desc="Features", total=num_expected, unit=" images", disable=None) as bar:
            for examples in DataLoader(stream, batch_size=batch_size, collate_fn=list):
                batches.append(_record_batch(encoder, examples, pooling, schema))
                bar.update(len(examples))
                if sum(map(len, batches)) >= ROWS_PER_GROUP:
                    num_written += _write_group(writer, batches)
        if batches:
            num_written += _write_group(writer, batches)
        if not num_written:
            raise ValueError("No image of the source can be read.")
    return num_written, stream.state_dict()["progress"]["num_bad"]


def with_index(source: datasets.IterableDataset) -> datasets.IterableDataset:
    """The columns needed, and `index`, the position in the source, in which bad images count too."""
    columns = [name for name in ("image", "image_id", "label") if name in source.features]
    features = datasets.Features({name: source.features[name] for name in columns})
    features["index"] = datasets.Value("int64")
    return source.select_columns(columns).map(_add_index, with_indices=True, features=features)


def _add_index(example: dict[str, Any], index: int) -> dict[str, Any]:
    return {**example, "index": index}


class WithMetadata:
    """A transform that adds index, id and path of the image to its view."""

    def __init__(self, transform: Transform) -> None:
        self.transform = transform

    def __call__(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        path = example["image"].get("path")
        view = self.transform(example, rng)
        return {**view, "index": example["index"], "image_id": example["image_id"], "path": path and redact_url(path)}


def _record_batch(encoder: Any, examples: list[dict[str, Any]], pooling: str, schema: pa.Schema) -> pa.RecordBatch:
    pixel_values = torch.stack([example["pixel_values"] for example in examples])
    features = encode(encoder, pixel_values, pooling=pooling)  # (batch, hidden_size)
    if not features.isfinite().all():
        first = examples[int((~features.isfinite()).any(dim=1).nonzero()[0])]
        raise ValueError(
            f"The features of the image at index {first['index']} are not finite: the encoder is damaged, or its "
            "dtype overflows."
        )
    columns = {name: [example[name] for example in examples] for name in schema.names if name != "features"}
    columns["features"] = pa.FixedSizeListArray.from_arrays(features.numpy().ravel(), features.shape[1])
    return pa.RecordBatch.from_pydict(columns, schema=schema)


def _write_group(writer: pq.ParquetWriter, batches: list[pa.RecordBatch]) -> int:
    """Write batches as a row group and clear the list; returns the number of rows."""
    table = pa.Table.from_batches(batches)
    writer.write_table(table, row_group_size=len(table))
    batches.clear()
    return len(table)


def _schema(
    source: datasets.Features, encoder: Any, processor: VLMViTImageProcessor, about: dict[str, Any]
) -> pa.Schema:
    """Columns as `datasets` reads them back, and what is known of the encoder."""
    features = datasets.Features(
        {"index": datasets.Value("int64"), "image_id": datasets.Value("int64"), "path": datasets.Value("string")}
    )
    if "label" in source:
        features["label"] = source["label"]
    features["features"] = datasets.List(datasets.Value("float32"), length=feature_size(encoder, about["pooling"]))
    known = {
        "encoder": redact_url(encoder.name_or_path),
        "encoder_fingerprint": weights_fingerprint(encoder),
        "image_size": [processor.size["height"], processor.size["width"]],
        "patch_size": list(getattr(encoder.config, "backbone_config", encoder.config).patch_hw),
        "hf_vlm": version("hf_vlm"),
        **about,
    }
    schema = features.arrow_schema
    return schema.with_metadata({**schema.metadata, METADATA_KEY: json.dumps(known).encode()})


def weights_fingerprint(encoder: Any) -> str:
    """A short hash of the weights, since the next run may overwrite their folder."""
    digest = hashlib.sha256()
    for name, weight in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
