"""What an opened source knows of its examples without reading them."""

import datasets
import pytest

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
