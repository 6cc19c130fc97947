"""Data sets on the Hub stream through `open_source`, private ones with a token, and resume exactly."""

import json

PUSH = """
import io
import datasets
from PIL import Image

def png(value):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}

features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
rows = {"image": [png(value) for value in range(30)], "label": [value % 2 for value in range(30)]}
for private in (False, True):
    name = "me/private" if private else "me/public"
    datasets.Dataset.from_dict(rows, features=features).push_to_hub(name, private=private, num_shards=3)
"""
READ = """
import json
from hf_vlm.data.io.decode import decode_image
from hf_vlm.data.sources import open_source

def value(example):
    return int(decode_image(example["image"])[0][0, 0, 0])

try:
    stream = open_source("NAME")
    found = {"values": [value(example) for example in stream], "classes": stream.features["label"].names}
    found["counts"] = [stream.num_examples, open_source("NAME", num_samples=7).num_examples]
    for stop in (1, 10, 17):
        first = open_source("NAME").dataset
        examples = iter(first)
        seen = [value(next(examples)) for _ in range(stop)]
        second = open_source("NAME").dataset
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        found[str(stop)] = seen + [value(example) for example in second]
except ValueError as error:
    found = {"error": str(error)}
print(json.dumps(found))
"""


def test_public_and_private_data_sets_stream_and_resume(run_python):
    run_python(PUSH)
    for name, token in (("me/public", None), ("me/private", "owner")):
        found = json.loads(run_python(READ.replace("NAME", name), token=token).splitlines()[-1])
        assert found["classes"] == ["a", "b"]
        assert found["counts"] == [30, 7]
        assert found["values"] == found["1"] == found["10"] == found["17"] == list(range(30))
    found = json.loads(run_python(READ.replace("NAME", "me/private"), token=None).splitlines()[-1])
    assert "me/private is no folder or file here, and as a dataset on the Hub it cannot be opened" in found["error"]
    assert "hf auth login" in found["error"]
