"""Search by words or by an image, among the features in a file of `write_features`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vlm.data.images import ImageLike
from hf_vlm.features.embedding import prepare_images
from hf_vlm.features.extraction import METADATA_KEY, SHARED, encode, weights_fingerprint
from hf_vlm.features.loading import is_used_whole, load_frozen_encoder, load_model
from hf_vlm.features.neighbors import feature_chunks, nearest_rows
from hf_vlm.features.texts import embed_texts, load_tokenizer

__all__ = ["FeatureIndex", "Found", "Searcher", "load_embedder"]

CHUNK_SIZE = 65536  # features compared at a time


@dataclass(frozen=True)
class Found:
    """An image that was found.

    Attributes:
        index: Position in the source that was embedded, from 0.
        similarity: Cosine of its features and the query's.
        image_id: Its id in the source.
        path: Its path; None where images have none.
    """

    index: int
    similarity: float
    image_id: int
    path: str | None


class FeatureIndex:
    """The features of a file in memory, four bytes each, compared with a query one by one: nothing is approximate.

    Attributes:
        about: What the file says of its features: encoder, pooling, data, split.
        features: (images, dim) float32, L2-normalised.

    Args:
        path: File of `write_features`.

    Raises:
        ValueError: It is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            file = pq.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no file of features: {str(error).splitlines()[0]}") from error
        with file:
            metadata, names = file.schema_arrow.metadata or {}, set(file.schema_arrow.names)
            if METADATA_KEY not in metadata or not {"index", "image_id", "path", "features"} <= names:
                raise ValueError(f"{path} is no file of features: write one with hf-vlm embed RUN --data ... --save.")
            self.about: dict[str, Any] = json.loads(metadata[METADATA_KEY])
            table = file.read(columns=["index", "image_id", "path"])
            width = file.schema_arrow.field("features").type.list_size
            self.features = torch.empty(len(table), width)
            first = 0
            for chunk in feature_chunks(file):
                F.normalize(chunk, dim=1, out=self.features[first : first + len(chunk)])
                first += len(chunk)
        self._indices, self._ids = (table.column(name).to_numpy() for name in ("index", "image_id"))
        self._paths = table.column("path")

    def __len__(self) -> int:
        return len(self.features)

    def search(self, queries: Tensor, num_results: int = 10) -> list[list[Found]]:
        """The images most similar to each of the queries (n, dim), the most similar first.

        Raises:
            ValueError: `num_results` is not positive.
        """
        similarities, rows = nearest_rows(
            queries, self.features.split(CHUNK_SIZE), num_results, are_normalized=True
        )  # (n, results) each
        return [
            [self._found(row, similarity) for row, similarity in zip(*pair)]
            for pair in zip(rows.tolist(), similarities.tolist())
        ]

    def _found(self, row: int, similarity: float) -> Found:
        path = self._paths[row].as_py()
        return Found(int(self._indices[row]), similarity, int(self._ids[row]), path)


class Searcher:
    """An index with the model that made it, by which words and images become queries.

    Args:
        index: File of `write_features`.
        model: Folder or Hub id of the model; by default the one that the file names.

    Raises:
        ValueError: There is no such file or model, or the features are another model's.
    """

    def __init__(self, index: Path, model: str | None = None) -> None:
        self.index = FeatureIndex(index)
        name = str(self.index.about["encoder"]) if model is None else model
        self.pooling = str(self.index.about["pooling"])
        self.model, self.processor, _ = load_embedder(name, self.pooling)
        if weights_fingerprint(self.model) != self.index.about["encoder_fingerprint"]:
            raise ValueError(
                f"{index} holds features of other weights than those in {name} now: embed the images again, or name "
                "the model with --model."
            )
        self.tokenizer = load_tokenizer(self.model) if self.pooling == SHARED else None

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Queries (texts, dim); ValueError where the model knows no texts."""
        if self.tokenizer is None:
            raise ValueError(
                f"The index holds features of an encoder that knows no words ({self.index.about['encoder']}): search "
                "it by an image, or pretrain with a recipe of image_text/ and embed with that."
            )
        return embed_texts(self.model, self.tokenizer, texts)

    def embed_images(self, images: Sequence[ImageLike]) -> Tensor:
        """Queries (images, dim); ValueError where an image cannot be read."""
        encoder = getattr(self.model, "backbone", self.model)
        return encode(self.model, prepare_images(encoder, images, self.processor), pooling=self.pooling)


def load_embedder(source: str, pooling: str | None = None) -> tuple[Any, Any, str]:
    """What embeds images: an encoder, or a model of images and texts; its image processor; and the pooling.

    Args:
        source: Folder or Hub id.
        pooling: See `encode`; by default the space that images share with texts, where the model has one, or else the
            mean of the patch tokens.

    Raises:
        ValueError: There is no model.
    """
    if pooling in (None, SHARED) and is_used_whole(source):
        loaded = load_model(source)
        return loaded.model, loaded.processor, SHARED
    return *load_frozen_encoder(source), pooling or "mean"
