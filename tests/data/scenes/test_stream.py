import itertools
import json
import pickle

import cv2
import numpy as np
import pytest
from faster_coco_eval.core import mask as coco_mask

from hf_vlm.data.scenes.render import PRESETS, render_scene
from hf_vlm.data.scenes.stream import scenes_source
from hf_vlm.data.scenes.symbols import SYMBOLS


def test_stream_holds_what_the_scenes_hold():
    source = scenes_source("easy", "validation", num_samples=70, seed=5)
    examples = list(source)
    assert [example["image_id"] for example in examples] == list(range(70))
    for example in examples[::23]:
        scene = render_scene(5, example["image_id"], PRESETS["easy"], split="validation")
        decoded = cv2.imdecode(np.frombuffer(example["image"]["bytes"], np.uint8), cv2.IMREAD_COLOR_RGB)
        assert np.abs(decoded.astype(float) - scene.image).mean() < 6
        for column, mask in (("mask", scene.semantic_mask), ("instance_mask", scene.instance_mask)):
            stored = cv2.imdecode(np.frombuffer(example[column]["bytes"], np.uint8), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(stored, mask)
        assert example["objects"]["bbox"] == scene.boxes.tolist()
        assert example["objects"]["category"] == scene.categories.tolist()
        assert example["objects"]["area"] == scene.areas.tolist()
        assert example["objects"]["iscrowd"] == [0] * len(scene.boxes)
        assert example["label"] == scene.label
    assert source.object_names == source.label_names == list("01234")
    assert source.mask_names == ["background", *"01234"]
    assert source.num_examples == 70
    # The stored form must be the one that the declared features have, or saving and casting would fail.
    assert source.features.encode_example(examples[0]) == examples[0]


def test_symbols_have_names():
    source = scenes_source("symbols", "test", num_samples=2)
    assert source.object_names == source.label_names == list(SYMBOLS)
    assert source.mask_names == ["background", *SYMBOLS]
    assert source.max_objects == 4
    assert source.features.encode_example(next(iter(source))) == next(iter(source))


def test_stream_without_masks_and_without_labels():
    source = scenes_source("easy", num_samples=3, masks=False)
    assert set(next(iter(source))) == set(source.features) == {"image", "image_id", "label", "objects", "text"}
    bare = source.unlabelled()
    assert set(next(iter(bare))) == set(bare.features) == {"image", "image_id"}
    assert bare.object_names is None
    assert bare.label_names is None
    assert source.mask_names is None  # there are no masks


def test_stream_resumes_exactly_and_twice():
    source = scenes_source("easy", num_samples=130, masks=False)
    everything = [example["image"]["bytes"] for example in source]
    seen, state = [], None
    for stop in (1, 50, 70, 130):
        resumed = pickle.loads(pickle.dumps(scenes_source("easy", num_samples=130, masks=False))).dataset
        if state is not None:
            resumed.load_state_dict(state)
        for example in resumed:
            seen.append(example["image"]["bytes"])
            state = resumed.state_dict()
            if len(seen) == stop:
                break
    assert seen == everything


def test_resuming_does_not_render_what_was_seen(monkeypatch):
    import hf_vlm.data.scenes.stream as scenes

    stream = scenes_source("easy", num_samples=6400, masks=False).dataset
    iterator = iter(stream)
    for _ in range(30):
        next(iterator)
    state, expected = stream.state_dict(), next(iterator)
    rendered = []
    original = render_scene
    monkeypatch.setattr(scenes, "render_scene", lambda *args, **kw: rendered.append(args[1]) or original(*args, **kw))
    stream.load_state_dict(state)
    assert next(iter(stream)) == expected
    assert rendered == [30]


def test_shards_divide_the_stream():
    stream = scenes_source("easy", num_samples=100, masks=False).dataset
    assert stream.num_shards == 64
    parts = [[example["image_id"] for example in stream.shard(num_shards=4, index=index)] for index in range(4)]
    assert sorted(itertools.chain(*parts)) == list(range(100))
    assert scenes_source("easy", num_samples=5).dataset.num_shards == 5


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"scenes have no split 'val'; there are train, validation, test"):
        scenes_source("easy", "val")
    with pytest.raises(ValueError, match="num_samples=0 must be positive"):
        scenes_source("easy", num_samples=0)


def test_masks_of_objects_are_those_of_the_scene():
    for example in scenes_source("hard", num_samples=4, object_masks=True):
        scene = render_scene(0, example["image_id"], PRESETS["hard"], split="train")
        texts = example["objects"]["segmentation"]
        assert len(texts) == len(scene.boxes) >= 3
        for row, text in enumerate(texts):
            np.testing.assert_array_equal(coco_mask.decode(json.loads(text)), scene.instance_mask == row + 1)
