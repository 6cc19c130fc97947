"""Data sets on the Hub are what they were on disk; what was interrupted sends only what is missing when repeated."""

import json

import datasets
import pytest
from huggingface_hub import DatasetCard
from sample_data import DETECTION, make_objects, png, write_images, write_parquet

from hf_vlm.cli.main import main
from hf_vlm.data.schema import image_feature
from hf_vlm.data.sources import open_source
from hf_vlm.deploy.push_dataset import DatasetPush, find_splits

DEFINE = """
import json
from hf_vlm.cli.main import main
from hf_vlm.data import shards
from hf_vlm.data.sources import open_source
from hf_vlm.deploy import push_dataset
from hf_vlm.deploy.hub import Repository
from hf_vlm.deploy.push_dataset import DatasetPush

shards.ROWS_PER_GROUP = 4
push_dataset.FILES_PER_COMMIT = 3

class Interrupted(Exception):
    pass

def push(data, repo="me/boxes", stop_after=None, private=False, **options):
    sent = []
    class Stopping(Repository):
        def send_ahead(self, addition):
            if len(sent) == stop_after:
                raise Interrupted
            sent.append(addition.path_in_repo)
            super().send_ahead(addition)
    repository = Stopping(repo, type="dataset", private=private)
    try:
        return DatasetPush(data, shard_bytes=1, **options).send(repository, message="data")
    except Interrupted:
        return None

"""
PUSH = """
commits = [push("boxes", stop_after=2), push("boxes"), push("boxes")]
print("MARK", json.dumps(commits))
"""
MORE = """
push("masks", repo="me/masks", private=True, license="cc-by-4.0")
assert main(["push", "boxes", "me/part", "--type", "dataset", "--splits", "validation", "--num_examples", "2"]) == 0
push("boxes", num_examples=4)
repository = Repository("me/boxes", type="dataset")
card = b"---\\nlicense: mit\\ncurator: anna\\n---\\n\\nmy own words\\n"
repository.commit([repository.prepare("README.md", card)], message="x")
push("boxes", num_examples=5)
"""
READ = """
import json
from hf_vlm.data.sources import open_source
found = {}
for name in ("me/boxes", "me/masks"):
    source = open_source(name, "train")
    examples = [dict(example) for example in source]
    for example in examples:
        for column in ("image", "mask"):
            if column in example:
                example[column] = len(example[column]["bytes"])
    names = {"objects": source.object_names, "masks": source.mask_names}
    found[name] = {"examples": examples, "count": source.num_examples, **names}
print("RESULT", json.dumps(found))
"""


@pytest.fixture(scope="module")
def pushed(start_hub, tmp_path_factory):
    """(hub, folder of the data, requests of three pushes of which the first stopped, their commits)."""
    folder = tmp_path_factory.mktemp("pushed_data")
    hub, run_python = start_hub(folder)
    here = folder / "elsewhere"
    for split, rows in (("train", range(10)), ("validation", range(10, 13))):
        columns = {
            "image": [{"bytes": png(row), "path": None} for row in rows],
            "image_id": list(rows),
            "objects": [make_objects(row) for row in rows],
        }
        write_parquet(here / "boxes" / f"{split}.parquet", columns, DETECTION)
    masks = {"image": image_feature(), "image_id": datasets.Value("int64"), "mask": image_feature()}
    columns = {
        "image": [{"bytes": png(row), "path": None} for row in range(3)],
        "image_id": [0, 1, 2],
        "mask": [{"bytes": png(row), "path": None} for row in range(3)],
    }
    write_parquet(here / "masks" / "train.parquet", columns, masks)
    (here / "masks" / "mask_classes.txt").write_text("sky\nroad\n")
    printed = run_python(DEFINE + PUSH)
    commits = json.loads(printed.split("MARK ")[1].splitlines()[0])
    return hub, here, list(hub.requests), commits, run_python


def test_a_push_that_was_interrupted_sends_what_is_missing_when_it_is_repeated(pushed):
    hub, _, requests, commits, _ = pushed
    sent = [request for request in requests if request.startswith("PUT /large/")]
    assert len(sent) == len(set(sent)) == 4  # of 10 and 3 examples in files of 4; each file once, in three pushes
    assert commits[0] is None
    assert commits[1] == commits[2]  # there was nothing to commit
    assert hub.repos["dataset", "me/boxes"].messages == ["initial commit", "data (part 1 of 2)", "data"]
    assert sorted(hub.files("me/boxes", kind="dataset")) == [
        "README.md",
        "data/train-00000.parquet",
        "data/train-00001.parquet",
        "data/train-00002.parquet",
        "data/validation-00000.parquet",
    ]


def test_the_card_counts_what_there_is(pushed):
    hub, *_ = pushed
    repo = hub.repos["dataset", "me/boxes"]
    files = next(files for files in repo.commits.values() if "README.md" in files)
    text = files["README.md"].data.decode()
    card = DatasetCard(text)
    assert card.data.license == "unknown"
    assert card.data.task_categories == ["object-detection"]
    assert card.data.size_categories == "n<1K"
    assert card.data.configs[0]["data_files"] == [
        {"split": "train", "path": "data/train-*"},
        {"split": "validation", "path": "data/validation-*"},
    ]
    info = datasets.DatasetInfo._from_yaml_dict(card.data.dataset_info)
    assert {name: split.num_examples for name, split in info.splits.items()} == {"train": 10, "validation": 3}
    assert info.features["objects"]["category"].feature.names == ["ant", "bee", "cat"]
    found = [category for row in range(10) for category in make_objects(row)["category"]]
    held_out = [category for row in range(10, 13) for category in make_objects(row)["category"]]
    rows = "".join(
        f"| {name} | {found.count(i)} | {held_out.count(i)} |\n" for i, name in enumerate(("ant", "bee", "cat"))
    )
    assert f"## Boxes of each class\n\n| class | train | validation |\n|---|---:|---:|\n{rows}\n" in text
    assert "named no licence of these data" in text
    assert "\n\n\n" not in text


def test_it_is_opened_by_its_name_with_boxes_masks_and_names(pushed):
    hub, here, _, _, run_python = pushed
    run_python(DEFINE + MORE)
    found = json.loads(run_python(READ).split("RESULT ")[1])
    local = [example["objects"] for example in open_source(here / "boxes", num_samples=5)]
    assert [example["objects"] for example in found["me/boxes"]["examples"]] == local
    assert (found["me/boxes"]["objects"], found["me/boxes"]["count"]) == (["ant", "bee", "cat"], 5)
    assert found["me/masks"]["masks"] == ["sky", "road"]
    assert [example["mask"] for example in found["me/masks"]["examples"]] == [len(png(row)) for row in range(3)]
    assert hub.repos["dataset", "me/masks"].private
    assert set(hub.files("me/part", kind="dataset")) == {"README.md", "data/validation-00000.parquet"}
    assert b"license: cc-by-4.0" in hub.files("me/masks", kind="dataset")["README.md"]
    # Files of the longer version are gone, and the card that somebody wrote knows the new numbers.
    files = hub.files("me/boxes", kind="dataset")
    assert len(files) == 4
    card = DatasetCard(files["README.md"].decode())
    assert card.text.strip() == "my own words"
    assert (card.data.license, card.data.curator) == ("mit", "anna")
    assert sum(split["num_examples"] for split in card.data.dataset_info["splits"]) == 8


def test_splits_and_what_does_not_fit(tmp_path, capsys):
    for name in ("train", "val", "extra"):
        write_images(tmp_path / "classes", [f"{name}/{label}/{row}.png" for label in "ab" for row in range(2)])
    assert find_splits(tmp_path / "classes") == ["train", "validation"]
    write_images(tmp_path / "flat", ["0.png", "1.png"])
    assert find_splits(tmp_path / "flat") == ["train"]
    with pytest.raises(ValueError, match="nothing does not exist"):
        find_splits(tmp_path / "nothing")
    images = {"image": [{"bytes": png(0), "path": None}], "image_id": [0]}
    write_parquet(tmp_path / "two" / "train.parquet", {**images, "objects": [make_objects(0)]}, DETECTION)
    write_parquet(tmp_path / "two" / "test.parquet", images, {name: DETECTION[name] for name in images})
    with pytest.raises(ValueError, match=r"splits 'train' and 'test' have different columns.*--splits"):
        DatasetPush(tmp_path / "two")
    with pytest.raises(ValueError, match="scenes have no end: name with --num_examples"):
        DatasetPush("scenes:easy")
    argv = ["push", str(tmp_path / "flat"), "me/flat", "--type", "dataset", "--dry_run"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "dataset repository me/flat (public):" in out
    assert out.splitlines()[-1].endswith("in 2 files")
