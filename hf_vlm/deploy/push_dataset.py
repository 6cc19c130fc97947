"""Data sets on the Hub: any source as Parquet files with its images and classes, and a card."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd
from tqdm.auto import tqdm

from hf_vlm.data.formats.mask_classes import MASK_CLASSES_FILE
from hf_vlm.data.formats.splits import NoSplitError, canonical_split
from hf_vlm.data.shards import SHARD_BYTES, ParquetShards
from hf_vlm.data.sources import open_source
from hf_vlm.deploy.dataset_card import Split, dataset_card
from hf_vlm.deploy.hub import Repository

__all__ = ["DatasetPush", "find_splits"]

logger = logging.getLogger(__name__)

FILES_PER_COMMIT = 50  # the Hub gives up on larger ones
SPLITS = ("train", "validation", "test")


class DatasetPush:
    """A source on its way to the Hub: `send` it, or `measure` what would be sent.

    Files are sent one after another, before any of them is committed. One that the Hub has is not sent again, so
    that a push that was interrupted resumes where it was when it is repeated.
    """

    def __init__(
        self,
        data: str | Path,
        *,
        splits: Sequence[str] | None = None,
        format: str | None = None,
        num_examples: int | None = None,
        allow_outside: bool = False,
        license: str | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Opens the splits.

        Args:
            data: Source, as `--data` takes it.
            splits: Names of the splits; all that there are by default.
            format: Format of the source; guessed by default.
            num_examples: First examples of each split; all by default.
            allow_outside: Whether what annotations name outside of the source may be followed.
            license: Identifier of the licence of the data, for the card; "unknown" by default.
            shard_bytes: Size at which a file is full.

        Raises:
            ValueError: There is no such source or split, or the splits have different columns or classes.
        """
        self.data, self.license, self.shard_bytes = data, license or "unknown", shard_bytes
        names = list(splits or find_splits(data, format=format, allow_outside=allow_outside))
        options: dict[str, Any] = {"format": format, "num_samples": num_examples, "allow_outside": allow_outside}
        self.sources = [open_source(data, name, **options) for name in names]
        first = self.sources[0]
        if first.format == "scenes" and num_examples is None:
            raise ValueError("scenes have no end: name with --num_examples how many of them to push.")
        for source in self.sources[1:]:
            if (source.features, source.mask_class_names) != (first.features, first.mask_class_names):
                raise ValueError(
                    f"{first.name}: the splits {first.split!r} and {source.split!r} have different columns or "
                    "classes; name one with --splits, or make them the same."
                )

    def measure(self, repo_id: str) -> dict[str, int]:
        """Size in bytes of each file that would be sent."""
        splits: list[Split] = []
        sizes = {}
        for name, content in self._contents(splits):
            sizes[name] = len(content)
        return sizes | {name: len(content) for name, content in self._other_files(repo_id, splits, None).items()}

    def send(self, repository: Repository, *, message: str) -> str:
        """Sends and commits all; files of earlier pushes that are not among them are deleted. Returns the commit's id.

        Raises:
            ValueError: Images cannot be read, or the Hub does not take it.
        """
        splits: list[Split] = []
        additions: list[CommitOperationAdd] = []
        for name, content in self._contents(splits):
            additions.append(repository.prepare(name, content))
            repository.send_ahead(additions[-1])
        rest = self._other_files(repository.id, splits, repository.read_text("README.md"))
        additions += [repository.prepare(name, content) for name, content in rest.items()]
        *earlier, last = [
            additions[start : start + FILES_PER_COMMIT] for start in range(0, len(additions), FILES_PER_COMMIT)
        ]
        for number, batch in enumerate(earlier, start=1):
            repository.commit(batch, message=f"{message} (part {number} of {len(earlier) + 1})")
        sent = [addition.path_in_repo for addition in additions]
        return repository.commit(last, stale=("data/*.parquet", MASK_CLASSES_FILE), kept=sent, message=message)

    def _contents(self, splits: list[Split]) -> Iterator[tuple[str, bytes]]:
        """Name and content of each Parquet file; `splits` gets what was written of each split."""
        for source in self.sources:
            split = Split(source, ParquetShards(source, shard_bytes=self.shard_bytes))
            splits.append(split)
            with tqdm(desc=split.name, total=source.num_examples, unit=" images", disable=None) as bar:
                for number, content in enumerate(split.shards):
                    bar.update(split.shards.num_examples - bar.n)
                    yield f"data/{split.name}-{number:05d}.parquet", content
            for text in split.shards.bad:
                logger.warning("left out: %s", text)

    def _other_files(self, repo_id: str, splits: Sequence[Split], card: str | None) -> dict[str, bytes]:
        """Content of the card, and of the names of masks where there are some."""
        files = {"README.md": dataset_card(repo_id, splits, self.license, earlier=card).encode()}
        if names := self.sources[0].mask_class_names:
            files[MASK_CLASSES_FILE] = "".join(f"{name}\n" for name in names).encode()
        return files


def find_splits(data: str | Path, *, format: str | None = None, allow_outside: bool = False) -> list[str]:
    """Names of the splits of a source, `train` first.

    Raises:
        ValueError: It cannot be opened.
    """
    if str(data).partition(":")[0] == "scenes":
        return list(SPLITS)
    no_split = "no split has this name"
    logger_of_data = logging.getLogger("hf_vlm.data")
    level = logger_of_data.level
    logger_of_data.setLevel(logging.ERROR)  # warnings come when the splits are opened
    try:
        open_source(data, no_split, format=format, num_samples=1, allow_outside=allow_outside)
    except NoSplitError as error:
        found = [canonical_split(name) for name in error.splits]
        return sorted(found, key=lambda name: (SPLITS.index(name) if name in SPLITS else len(SPLITS), name))
    finally:
        logger_of_data.setLevel(level)
    return ["train"]
