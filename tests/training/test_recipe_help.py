"""The help of commands that take a recipe."""

from collections import Counter
from dataclasses import fields

import pytest

from hf_vlm.cli.main import main
from hf_vlm.training.arguments import VisionTrainingArguments
from hf_vlm.training.recipe_help import FIXED, GROUPS


def test_every_key_of_ours_is_in_one_group():
    grouped = Counter(name for names in GROUPS.values() for name in names)
    assert set(grouped.values()) == {1}
    assert set(VisionTrainingArguments.__annotations__) <= set(grouped) | set(FIXED)
    assert set(grouped) <= {field.name for field in fields(VisionTrainingArguments)}


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_help_names_every_key(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "  --layer_decay                     Learning rate of a layer relative" in printed
    assert "trained, with a warm-up" in printed
    words = set(printed.replace(",", " ").replace("--", " ").split())
    keys = {field.name for field in fields(VisionTrainingArguments) if field.init}
    assert keys - set(FIXED) <= words
