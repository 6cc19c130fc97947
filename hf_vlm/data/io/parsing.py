"""json and yaml of others, read within bounds: what a few bytes would expand to gigabytes is refused."""

import json
from typing import Any

import yaml

__all__ = ["MAX_TEXT_BYTES", "parse_json", "parse_yaml"]

MAX_TEXT_BYTES = 2**24  # of the labels of one image, or of a file of settings; a million boxes have as many


def parse_json(text: str | bytes) -> Any:
    """The content of a json.

    Raises:
        ValueError: It is no json, or nests deeper than the interpreter can follow.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it nests too deep") from None


def parse_yaml(text: str | bytes, *, loader: Any = yaml.SafeLoader) -> Any:
    """The content of a yaml, without aliases: a few lines of them would expand to a list of any length.

    Args:
        loader: Loader of PyYAML, one that makes no objects.

    Raises:
        ValueError: It is no yaml, has aliases, is longer than `MAX_TEXT_BYTES`, or nests too deep.
    """
    if len(text) > MAX_TEXT_BYTES:
        raise ValueError(f"its length {len(text):,} is more than the {MAX_TEXT_BYTES:,} that are read")

    class WithoutAliases(loader):  # type: ignore[misc]
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError(f"line {self.peek_event().start_mark.line + 1} has an alias, which is not read")
            return super().compose_node(parent, index)

    try:
        return yaml.load(text, WithoutAliases)
    except yaml.YAMLError as error:
        raise ValueError(f"it is not yaml: {error}") from error
    except RecursionError:
        raise ValueError("it nests too deep") from None
