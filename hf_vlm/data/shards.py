"""A source as Parquet files that hold everything, images included; the same source gives the same bytes."""

import io
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from hf_vlm.data.io.decode import BadImageError, image_size, read_image_bytes
from hf_vlm.data.io.messages import one_line, summarise
from hf_vlm.data.source import Source

__all__ = ["ParquetShards"]

SHARD_BYTES = 500_000_000
ROWS_PER_GROUP = 100  # which readers of a stream hold in memory
MAX_BAD_FRACTION = 0.01
IMAGE_COLUMNS = ("image", "mask", "instance_mask")


class ParquetShards:
    """The examples of a source as the contents of Parquet files; iterating reads it once.

    Attributes:
        features: Types of the columns, with images that `datasets` decodes.
        num_examples: Examples written so far.
        num_bytes: Bytes of the files written so far.
        label_counts: Images of each class, by its number.
        object_counts: Boxes of each class, by its number.
        bad: Messages of the images that were left out, as they cannot be read.
    """

    def __init__(self, source: Source, *, shard_bytes: int = SHARD_BYTES) -> None:
        """Prepares to write.

        Args:
            shard_bytes: Size at which a file is full.
        """
        self.source, self.shard_bytes = source, shard_bytes
        self.features = datasets.Features(source.features)
        for name in IMAGE_COLUMNS:
            if name in self.features:
                self.features[name] = datasets.Image()
        self.num_examples = self.num_bytes = 0
        self.label_counts: Counter[int] = Counter()
        self.object_counts: Counter[int] = Counter()
        self.bad: list[str] = []

    def __iter__(self) -> Iterator[bytes]:
        """The contents of the files, in order.

        Raises:
            ValueError: There is no image, or more than 1 % of them cannot be read.
        """
        rows: list[dict[str, Any]] = []
        file, writer = self._open()
        for example in self.source:
            try:
                rows.append(self._row(example))
            except BadImageError as error:
                self.bad.append(one_line(error))
                continue
            self.num_examples += 1
            if len(rows) == ROWS_PER_GROUP:
                self._write(writer, rows)
                rows = []
                if file.tell() >= self.shard_bytes:
                    yield self._close(file, writer)
                    file, writer = self._open()
        self._check()
        if rows:
            self._write(writer, rows)
        if rows or file.tell() > len(b"PAR1"):
            yield self._close(file, writer)

    def _row(self, example: dict[str, Any]) -> dict[str, Any]:
        """An example with the bytes of its images; of their paths the names alone, for folders are private."""
        row = dict(example)
        for name in IMAGE_COLUMNS:
            if name not in row or row[name] is None:
                continue
            data, path = read_image_bytes(row[name]), row[name].get("path")
            if name == "image" and image_size(data) is None:
                raise BadImageError(f"{path or example['image_id']}: no image")
            row[name] = {"bytes": data, "path": PurePosixPath(path).name if path else None}
        if row.get("label") is not None:
            self.label_counts[row["label"]] += 1
        self.object_counts.update((row.get("objects") or {}).get("category", ()))
        return row

    def _open(self) -> tuple[io.BytesIO, pq.ParquetWriter]:
        file = io.BytesIO()
        # Cut by content, so that the Hub stores what two versions have in common once.
        return file, pq.ParquetWriter(file, self.features.arrow_schema, use_content_defined_chunking=True)

    def _write(self, writer: pq.ParquetWriter, rows: list[dict[str, Any]]) -> None:
        encoded = [self.features.encode_example(row) for row in rows]
        writer.write_table(pa.Table.from_pylist(encoded, schema=self.features.arrow_schema))

    def _close(self, file: io.BytesIO, writer: pq.ParquetWriter) -> bytes:
        writer.close()
        content = file.getvalue()
        self.num_bytes += len(content)
        return content

    def _check(self) -> None:
        total = self.num_examples + len(self.bad)
        if len(self.bad) > MAX_BAD_FRACTION * total or not self.num_examples:
            raise ValueError(
                f"{self.source.name}: {len(self.bad)} of {total} images of split {self.source.split!r} cannot be read"
                + (f", among them {summarise(self.bad, num_shown=3)}" if self.bad else "")
            )
