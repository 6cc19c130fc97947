"""What an opened source knows of its examples without reading them."""

from pathlib import Path

import datasets
import numpy as np
import pytest
from sample_data import write_detection_parquet, write_images

from hf_vlm.data.io.decode import decode_mask
from hf_vlm.data.schema import image_feature, objects_feature
from hf_vlm.data.source import Source
from hf_vlm.data.sources import open_source

FEATURES = {
    "image": image_feature(),
    "image_id": datasets.Value("int64"),
    "label": datasets.ClassLabel(names=["indoors", "outdoors"]),
    "objects": objects_feature(["cat", "dog"]),
    "mask": image_feature(),
}


def make_source(*columns, **fields):
    features = datasets.Features({name: FEATURES[name] for name in ("image", "image_id", *columns)})
    dataset = datasets.IterableDataset.from_generator(lambda: iter(()), features=features)
    return Source(dataset=dataset, **fields)


@pytest.mark.parametrize(
    ("columns", "labels", "objects", "masks"),
    [
        ((), None, None, None),
        (("label",), ["indoors", "outdoors"], None, None),
        (("objects",), None, ["cat", "dog"], None),
        (("label", "objects"), ["indoors", "outdoors"], ["cat", "dog"], None),
        (("objects", "mask"), None, ["cat", "dog"], ["road", "sky", "tree"]),
    ],
)
def test_class_names_of_labels_boxes_and_masks_are_apart(columns, labels, objects, masks):
    source = make_source(*columns, mask_class_names=("road", "sky", "tree"))
    assert (source.label_names, source.object_names, source.mask_names) == (labels, objects, masks)
    bare = source.unlabelled()
    assert list(bare.features) == ["image", "image_id"]
    assert (bare.label_names, bare.object_names, bare.mask_names) == (None, None, None)


def test_names_of_masks_may_not_be_known():
    assert make_source("mask").mask_names is None


def test_masks_follow_the_names_of_their_classes():
    source = open_source("scenes:easy", num_samples=1)
    (example,) = source
    values = decode_mask(example["mask"])
    names = ["4", "sky", "3", "background", "2", "1", "0"]
    renamed = source.with_classes(names)
    assert renamed.mask_names == names
    found = decode_mask(next(iter(renamed))["mask"])
    assert len(np.unique(values)) > 1
    np.testing.assert_array_equal(np.array(names)[found], np.array(source.mask_names)[values])
    of_objects = source.with_classes(["4", "3", "2", "1", "0"])  # which no background is among
    assert of_objects.mask_names == source.mask_names
    np.testing.assert_array_equal(decode_mask(next(iter(of_objects))["mask"]), values)
    assert next(iter(of_objects))["objects"]["segmentation"] == example["objects"]["segmentation"] != []


def test_sources_are_named_without_secrets(tmp_path):
    source = open_source("scenes:hard", "validation", num_samples=2)
    assert (source.name, source.format, source.split) == ("scenes:hard", "scenes", "validation")
    datasets.Dataset.from_list(list(source)).to_parquet(tmp_path / "a.parquet")
    source = open_source(f"file://{tmp_path}/a.parquet")
    assert (source.name, source.format, source.split) == (f"file://{tmp_path}/a.parquet", "parquet", "train")
    mixed = open_source({str(tmp_path): 1, "scenes": 1})
    assert (mixed.name, mixed.format) == (f"{tmp_path}, scenes", "mixture")
    assert (mixed.mask_names, mixed.num_examples) == (None, None)
    scenes = open_source({"scenes:easy": 1, "scenes": 1})
    assert scenes.mask_names == ["background", *"01234"]


def test_sources_know_their_number_of_examples(tmp_path):
    assert open_source("scenes:easy", num_samples=7).num_examples == 7
    assert open_source("scenes:easy", num_samples=7).unlabelled().num_examples == 7
    scenes = datasets.Dataset.from_list(list(open_source("scenes:easy", num_samples=12)))
    scenes.to_parquet(tmp_path / "train-0.parquet", batch_size=5)
    scenes.to_parquet(tmp_path / "train-1.parquet", batch_size=5)
    assert open_source(tmp_path).num_examples == 24
    assert open_source(tmp_path, num_samples=17).num_examples == 17
    assert open_source({str(tmp_path): 1.0, "scenes:easy": 1.0}).num_examples is None


def test_a_held_out_fraction_is_stable_and_complete(tmp_path):
    write_images(tmp_path / "a", [f"{index}.png" for index in range(200)])
    names = lambda source: {Path(example["image"]["path"]).name for example in source}  # noqa: E731
    source = open_source(tmp_path / "a")
    train, held_out = source.holdout(0.2)
    assert len(names(train)) + len(names(held_out)) == 200
    assert not names(train) & names(held_out)
    assert (train.num_examples, held_out.num_examples) == (len(names(train)), len(names(held_out)))
    assert 25 < held_out.num_examples < 55  # 40 on average, with a deviation of 5.7
    assert train.features == held_out.features == source.features
    first = source.holdout(0.2, 10)[1]
    assert (first.num_examples, len(names(first))) == (10, 10)
    assert names(first) < names(held_out)
    assert source.holdout(0.2, 500)[1].num_examples == held_out.num_examples
    # Elsewhere, with more images, and as a larger fraction.
    before = names(held_out)
    (tmp_path / "b").mkdir()
    (tmp_path / "a").rename(tmp_path / "b" / "a")
    write_images(tmp_path / "b" / "a", ["00.png", "more.png"])
    moved = open_source(tmp_path / "b" / "a")
    assert names(moved.holdout(0.2)[1]) - {"00.png", "more.png"} == before
    assert names(moved.holdout(0.2)[1]) < names(moved.holdout(0.5)[1])


def test_holdout_of_rows_without_names(tmp_path):
    write_detection_parquet(tmp_path / "a.parquet", num_rows=60)
    train, held_out = open_source(tmp_path / "a.parquet").holdout(0.25)
    ids = [[example["image_id"] for example in side] for side in (train, held_out)]
    assert sorted(ids[0] + ids[1]) == list(range(100, 160))
    assert [len(side) for side in ids] == [train.num_examples, held_out.num_examples]
    state = iter(held_out.dataset)
    assert next(state)["objects"] == next(
        e["objects"] for e in open_source(tmp_path / "a.parquet") if e["image_id"] == ids[1][0]
    )


@pytest.mark.parametrize(
    ("fraction", "message"), [(0.0, "between 0 and 1"), (1.0, "between 0 and 1"), (1e-6, "of 3 images leaves 3")]
)
def test_a_held_out_fraction_that_makes_no_sense_is_refused(tmp_path, fraction, message):
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path).holdout(fraction)
