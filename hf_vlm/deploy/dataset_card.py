"""The card of a data set on the Hub: what it holds, counted while it was written."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard, DatasetCardData

from hf_vlm.data.formats.splits import canonical_split
from hf_vlm.data.shards import ParquetShards
from hf_vlm.data.source import Source
from hf_vlm.deploy.hub import format_size
from hf_vlm.deploy.markdown import markdown
from hf_vlm.deploy.model_card import CARD_MARKER, render_card

__all__ = ["Split", "dataset_card"]

MAX_CLASSES = 200  # that the card lists
# By column, the task that the Hub lists the data set under.
TASK_CATEGORIES = {"objects": "object-detection", "label": "image-classification", "mask": "image-segmentation"}
SIZE_CATEGORIES = {
    "n<1K": 10**3,
    "1K<n<10K": 10**4,
    "10K<n<100K": 10**5,
    "100K<n<1M": 10**6,
    "1M<n<10M": 10**7,
    "10M<n<100M": 10**8,
    "100M<n<1B": 10**9,
}
COLUMNS = {
    "image": "the image, as it was encoded",
    "image_id": "its number",
    "label": "its class",
    "objects": "its boxes: `bbox` x, y, width, height in pixels, `category`, `area` in pixels, `iscrowd` as in COCO; "
    "where they have masks, `segmentation` as COCO's JSON",
    "mask": "the class of each pixel, 255 for none",
    "instance_mask": "the number of the object at each pixel, 0 for none",
    "text": "its captions",
}


@dataclass(frozen=True)
class Split:
    """A split, and what was written of it."""

    source: Source
    shards: ParquetShards

    @property
    def name(self) -> str:
        """Name of the split on the Hub."""
        return canonical_split(self.source.split)


def dataset_card(repo_id: str, splits: Sequence[Split], license: str, *, earlier: str | None = None) -> str:
    """The card of a data set whose splits have been written.

    Args:
        earlier: The card that the repository has. Without its marker line it is somebody's own: its text stays, and of
            its metadata all but what says which files and columns there are.
    """
    source = splits[0].source
    data_files = [{"split": split.name, "path": f"data/{split.name}-*"} for split in splits]
    content = {
        "size_categories": _size_category(sum(split.shards.num_examples for split in splits)),
        "configs": [{"config_name": "default", "data_files": data_files}],
        "dataset_info": _dataset_info(splits),
    }
    if earlier is not None and CARD_MARKER not in earlier:
        card = DatasetCard(earlier)
        for name, value in content.items():
            card.data[name] = value
        return str(card)
    name = repo_id.split("/")[-1]
    metadata = DatasetCardData(
        pretty_name=name,
        license=license,
        task_categories=[task for column, task in TASK_CATEGORIES.items() if column in source.features],
        tags=["hf_vlm"],
        **content,
    )
    values = {
        "card_data": metadata.to_yaml(),
        "name": markdown(name),
        "repo_id": repo_id,
        "license": license,
        "columns": {column: COLUMNS[column] for column in source.features},
        "splits": splits,
        "format_size": format_size,
        "num_bad": sum(len(split.shards.bad) for split in splits),
        "tables": _class_tables(splits),
        "marker": CARD_MARKER,
    }
    return render_card("dataset.md", values)


def _size_category(num_examples: int) -> str:
    return next((name for name, limit in SIZE_CATEGORIES.items() if num_examples < limit), "n>1T")


def _dataset_info(splits: Sequence[Split]) -> Any:
    """The columns and the number of examples of each split, as `datasets` reads them from a card."""
    found = SplitDict()
    for split in splits:
        shards = split.shards
        found.add(SplitInfo(split.name, num_bytes=shards.num_bytes, num_examples=shards.num_examples))
    size = sum(split.shards.num_bytes for split in splits)
    info = DatasetInfo(features=splits[0].shards.features, splits=found, download_size=size, dataset_size=size)
    data = DatasetCardData()
    DatasetInfosDict({"default": info}).to_dataset_card_data(data)
    return data["dataset_info"]


def _class_tables(splits: Sequence[Split]) -> list[tuple[str, list[tuple[str, list[int]]]]]:
    """Title and rows of one table per column of classes; a row is a class's name and its count in each split."""
    source = splits[0].source
    found: list[tuple[str, list[str] | None, list[Counter[int]]]] = [
        ("Images of each class", source.label_names, [split.shards.label_counts for split in splits]),
        ("Boxes of each class", source.object_names, [split.shards.object_counts for split in splits]),
    ]
    return [
        (
            title,
            [(markdown(name), [count[number] for count in counts]) for number, name in enumerate(names)][:MAX_CLASSES],
        )
        for title, names, counts in found
        if names
    ]
