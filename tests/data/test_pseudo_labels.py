"""A table of found objects: kept in a file, cut to the best, and used as labels."""

import datasets
import numpy as np
import pytest
from sample_data import write_images

from hf_vlm.data.pseudo_labels import LabelsOfImage, PseudoLabels
from hf_vlm.data.sources import open_source


def objects_of(image_id, *scores):
    n = len(scores)
    boxes = (np.arange(4 * n, dtype=np.float32) + image_id).reshape(-1, 4)
    return LabelsOfImage(image_id, boxes, np.arange(n) % 2, np.array(scores, dtype=np.float32))


FOUND = [objects_of(7, 0.9, 0.2, 0.6), objects_of(2), objects_of(5, 0.7), objects_of(-3, 0.1, 0.8)]


@pytest.fixture
def table():
    return PseudoLabels.collect(FOUND, ["cat", "dog"])


def as_lists(table):
    return {
        int(image_id): [table.boxes[here].tolist(), table.labels[here].tolist(), table.scores[here].tolist()]
        for image_id in table.image_ids
        for here in [table.of(image_id)]
    }


def test_each_image_has_its_own_objects_in_any_order(table):
    expected = {
        image.image_id: [image.boxes.tolist(), image.labels.tolist(), image.scores.tolist()] for image in FOUND
    }
    assert as_lists(table) == expected
    assert as_lists(PseudoLabels.collect(FOUND[::-1], ["cat", "dog"])) == expected
    with pytest.raises(ValueError, match="image 6"):
        table.of(6)
    assert len(PseudoLabels.collect([], ["cat"]).boxes) == 0


@pytest.mark.parametrize(
    ("count", "kept"), [(0, []), (2, [0.9, 0.8]), (4, [0.9, 0.8, 0.7, 0.6]), (6, None), (9, None)]
)
def test_the_best_are_chosen_over_all_images(table, count, kept):
    best = table.best(count)
    expected = sorted(table.scores.tolist() if kept is None else kept, reverse=True)
    np.testing.assert_allclose(sorted(best.scores, reverse=True), expected, rtol=1e-6)
    everything = as_lists(table)
    for image_id, (boxes, _, scores) in as_lists(best).items():  # each is still the box of its score
        _, _, all_scores = everything[image_id]
        assert boxes == [everything[image_id][0][all_scores.index(score)] for score in scores]
    assert table.num_scored(0.7) == 3


def test_a_saved_table_is_the_same_and_of_no_other_origin(table, tmp_path):
    path = tmp_path / "found.parquet"
    assert PseudoLabels.load(path, "a") is None
    table.save(path, "a")
    loaded = PseudoLabels.load(path, "a")
    assert as_lists(loaded) == as_lists(table)
    assert loaded.class_names == ("cat", "dog")
    assert loaded.labels.dtype == np.int64
    assert PseudoLabels.load(path, "b") is None
    path.write_bytes(path.read_bytes()[:-20])
    assert PseudoLabels.load(path, "a") is None
    assert [p.name for p in tmp_path.iterdir()] == ["found.parquet"]


def test_images_get_what_was_found_in_them_and_others_are_left_out(tmp_path):
    write_images(tmp_path, [f"{i}.png" for i in range(5)])
    source = open_source(str(tmp_path), "train")
    found = [
        LabelsOfImage(i, np.full((n, 4), i + 1, np.float32), np.zeros(n, np.int64), np.ones(n, np.float32))
        for i, n in enumerate([2, 0, 1, 0, 3])
    ]
    labelled = PseudoLabels.collect(found, ["object"]).label(source)
    examples = list(labelled)
    assert [example["image_id"] for example in examples] == [0, 2, 4]
    assert [len(example["objects"]["bbox"]) for example in examples] == [2, 1, 3]
    assert examples[2]["objects"] == {
        "bbox": [[5.0] * 4] * 3,
        "category": [0] * 3,
        "area": [25.0] * 3,
        "iscrowd": [0] * 3,
    }
    originals = {example["image_id"]: example["image"] for example in source}
    assert all(example["image"] == originals[example["image_id"]] for example in examples)
    assert (labelled.num_examples, labelled.max_objects, labelled.object_names) == (3, 3, ["object"])
    assert isinstance(labelled.dataset, datasets.IterableDataset)


def test_masks_stay_with_their_boxes(tmp_path):
    """Through choosing the best, the file, and into the objects of a source."""
    write_images(tmp_path / "images", [f"{i}.png" for i in range(3)])
    texts = {0: ["[[0,0,4,0,4,4]]", ""], 1: [], 2: ["[[1,1,9,1,9,9]]"]}
    scores = {0: (0.9, 0.2), 1: (), 2: (0.5,)}
    found = [objects_of(i, *scores[i])._replace(segmentations=texts[i]) for i in (2, 0, 1)]
    table = PseudoLabels.collect(found, ["cat", "dog"])
    table.save(tmp_path / "found.parquet", "a")
    loaded = PseudoLabels.load(tmp_path / "found.parquet", "a")
    assert loaded.segmentations.tolist() == table.segmentations.tolist() == [*texts[0], *texts[2]]
    assert loaded.best(2).segmentations.tolist() == [texts[0][0], texts[2][0]]
    labelled = loaded.label(open_source(str(tmp_path / "images"), "train"))
    assert labelled.has_object_masks
    assert [example["objects"]["segmentation"] for example in labelled] == [texts[0], texts[2]]
    assert PseudoLabels.collect(FOUND, ["cat", "dog"]).segmentations is None
