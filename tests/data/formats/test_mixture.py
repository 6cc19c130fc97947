"""Sources mixed by weight."""

import collections
import json

import numpy as np
import pytest
import yaml
from datasets import Dataset
from sample_data import make_coco, write_coco
from torchdata.stateful_dataloader import StatefulDataLoader

from hf_vlm.data.sources import open_source
from hf_vlm.data.stream import ExampleStream
from hf_vlm.training.run import pretrain

SIZES = {"a": 300, "b": 40}


@pytest.fixture
def sources(tmp_path):
    """Two Parquet files; the bytes of an image name its file and position."""
    for name, size in SIZES.items():
        rows = [{"image": f"{name}{index}".encode(), "label": index % 2} for index in range(size)]
        Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet", batch_size=7)
    return {str(tmp_path / "a.parquet"): 3, str(tmp_path / "b.parquet"): 1}


def name_of(example, generator=None):
    return {"name": example["image"]["bytes"].decode(), "image_id": example["image_id"]}


def test_fractions_are_the_weights_and_nothing_is_left_out(sources):
    examples = [name_of(example) for example in open_source(sources)]
    counts = collections.Counter(example["name"] for example in examples)
    assert set(counts) == {f"{name}{index}" for name, size in SIZES.items() for index in range(size)}
    assert max(counts[f"a{index}"] for index in range(SIZES["a"])) == 1  # the longer one makes the epoch
    assert np.mean([example["name"][0] == "a" for example in examples]) == pytest.approx(0.75, abs=0.06)


def test_ids_are_unique(sources):
    by_id = collections.defaultdict(set)
    for example in map(name_of, open_source(sources)):
        by_id[example["image_id"]].add(example["name"])
    assert len(by_id) == sum(SIZES.values())
    assert all(len(names) == 1 for names in by_id.values())
    assert by_id[2 * 7 + 1] == {"b7"}


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("world_size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (1, 2)), 3])
def test_ranks_and_workers_see_every_example_in_an_epoch(sources, world_size, num_workers):
    seen = set()
    for rank in range(world_size):
        stream = ExampleStream(
            open_source(sources).dataset, name_of, repeat=False, block_size=16, rank=rank, world_size=world_size
        )
        loader = StatefulDataLoader(stream, batch_size=None, num_workers=num_workers)
        seen |= {example["name"] for example in loader}
    assert len(seen) == sum(SIZES.values())


def test_resumes_exactly(sources):
    def stream():
        return ExampleStream(open_source(sources).dataset, name_of, block_size=16)

    iterator = iter(stream())
    expected = [next(iterator)["name"] for _ in range(900)]  # more than two epochs
    for position in (0, 5, 16, 399, 500, 777):
        first = stream()
        examples = iter(first)
        for _ in range(position):
            next(examples)
        second = stream()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        resumed = iter(second)
        assert [next(resumed)["name"] for _ in range(60)] == expected[position : position + 60]


def test_labels_stay_where_classes_are_equal(sources, tmp_path, caplog):
    source = open_source(sources)
    assert source.label_names == ["0", "1"]
    assert all(example["label"] == int(name_of(example)["name"][1:]) % 2 for example in source)
    Dataset.from_list([{"image": b"c0", "label": "dog"}]).to_parquet(tmp_path / "c.parquet")
    source = open_source({**sources, str(tmp_path / "c.parquet"): 1})
    assert list(source.features) == ["image", "image_id"]
    assert "the column 'label' is left out, since its classes differ" in caplog.text


def test_columns_are_judged_each_by_itself(tmp_path):
    """Equal boxes stay where labels differ, and equal labels where one source alone has boxes."""

    def write(name, label, boxes):
        objects = {"objects": {"bbox": [[0.0, 0.0, 4.0, 4.0]], "category": ["cell"]}} if boxes else {}
        Dataset.from_list([{"image": b"x", "label": label, "image_id": 2**62} | objects]).to_parquet(tmp_path / name)
        return str(tmp_path / name)

    first, other = write("a.parquet", "cat", True), write("b.parquet", "dog", True)
    assert set(open_source({first: 1, other: 1}).features) == {"image", "image_id", "objects"}
    third = write("c.parquet", "cat", False)
    examples = list(open_source({first: 1, third: 1}))
    assert set(examples[0]) == {"image", "image_id", "label"}
    assert all(0 <= example["image_id"] < 2**63 for example in examples)


def test_an_endless_source_among_them():
    stream = iter(open_source({"scenes:easy": 1, "scenes:hard": 1}))
    assert len([next(stream) for _ in range(20)]) == 20


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "1", True])
def test_weights_must_be_positive(sources, weight):
    with pytest.raises(ValueError, match=r"weights of a mixture must be positive numbers, not .*b\.parquet"):
        open_source({**sources, list(sources)[1]: weight})


def test_an_empty_mixture_is_named():
    with pytest.raises(ValueError, match="at least one source"):
        open_source({})


def test_a_recipe_trains_on_a_mixture_and_records_it(tmp_path):
    recipe = {
        "method": "mae",
        "output_dir": str(tmp_path / "run"),
        "data": {"scenes:easy": 0.7, "scenes:hard": 0.3},
        "encoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 8},
        "model_config": {"decoder_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}},
        "image_size": 32,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "shuffle_block": 8,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    from hf_vlm.deploy.model_card import write_model_card

    pretrain(recipe, write_card=write_model_card)
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["data"] == recipe["data"]
    assert "scenes:easy, scenes:hard" in (tmp_path / "run" / "README.md").read_text()


def test_masks_of_objects_stay_where_all_sources_have_them(tmp_path):
    for name, segmentation in (("a", [[1, 2, 4, 2, 4, 6]]), ("b", [[1, 2, 4, 2, 4, 6]]), ("c", [])):
        content = make_coco(1)
        content["annotations"][0]["segmentation"] = segmentation
        write_coco(tmp_path / name / "a.json", tmp_path / name, content, num_images=1)
    for names, has_masks in (("ab", True), ("ac", False)):
        mixture = open_source({str(tmp_path / name): 1 for name in names})
        assert mixture.has_object_masks == has_masks
        for example in mixture:
            assert ("segmentation" in example["objects"]) == has_masks
            assert example["objects"]["bbox"] == [[0, 1, 4, 3]]
