"""The page of a report: whole, self-contained, and harmless whatever the names in the data are."""

import base64
import io
import json
from html.parser import HTMLParser

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_vlm.data.schema import image_feature
from hf_vlm.data.source import Source
from hf_vlm.metrics.detection_matches import match_detections
from hf_vlm.tasks import TASKS, Evaluation
from hf_vlm.tasks.evaluation import EvaluatedImage, EvaluatedSplit
from hf_vlm.tasks.reports.detection import DetectionOutcomes
from hf_vlm.tasks.reports.parts import Case, Marks
from hf_vlm.viz.report import write_report
from hf_vlm.viz.report_cases import SIDE, CaseImages

HOSTILE = ["<script>alert(1)</script>", '$x$ & "y" \x1b[31m\u202e', "</text><image href='http://a.b/c'/>"]
VOID = {"meta", "br", "img"}
RED, BLUE = (250, 10, 10), (10, 10, 250)


class Page(HTMLParser):
    """Tags of a page, which must be closed in order, its text, and its attributes."""

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data if self.open and self.open[-1] != "style" else ""


def source_of(sizes):
    """Images of which the left half is red and the right one blue."""
    rows = []
    for index, (width, height) in enumerate(sizes):
        picture = Image.new("RGB", (width, height), RED)
        picture.paste(BLUE, (width // 2, 0, width, height))
        file = io.BytesIO()
        picture.save(file, "PNG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "image_id": 100 + index})
    features = datasets.Features({"image": image_feature(), "image_id": datasets.Value("int64")})
    dataset = datasets.Dataset.from_list(rows, features=features).to_iterable_dataset()
    return Source(dataset=dataset, name="<b>photos</b>", split="test")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The report of a detector on three images, of which the second in the source could not be read."""
    folder = tmp_path_factory.mktemp("report")
    boxes = np.array([[5.0, 5, 25, 25]])
    references = [{"boxes": boxes, "labels": np.array([index])} for index in range(3)]
    predictions = [{"boxes": boxes, "scores": np.array([0.9]), "labels": np.array([label])} for label in (0, 2, 2)]
    metrics = {"ap": 0.5, "ap50": float("nan"), **{f"ap/{name}": 0.1 for name in HOSTILE}}
    metrics |= {f"{kind}_{size}": 0.5 for kind in ("ap", "ar") for size in ("small", "medium", "large")}
    outcomes = DetectionOutcomes(match_detections(predictions, references), 0.5)
    evaluation = Evaluation(metrics=metrics, class_names=HOSTILE, outcomes=outcomes)
    images = [EvaluatedImage(i, 100 + i, f"photos/<i>{i}.png") for i in (0, 2, 3)]
    split = EvaluatedSplit(evaluation, TASKS["object-detection"], source_of([(40, 30)] * 4), images)
    path = write_report(folder, "runs/<u>detector", split)
    return path.read_text(encoding="utf-8"), json.loads(
        (folder / "report.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON")
    )


def test_the_page_is_whole_and_holds_all_parts(written):
    page, values = Page(written[0]), written[1]
    assert page.tags.count("svg") == 4  # two curves, the confusion matrix, the histogram
    assert page.tags.count("section") == 1 + len(values["parts"])
    assert [part["title"] for part in values["parts"] if part["title"] not in page.text] == []
    assert "image 102, photos/<i>2.png" in page.text
    assert values["metrics"]["ap50"] is None
    identifiers = [value for _, name, value in page.attributes if name == "id"]
    assert len({*identifiers}) == len(identifiers)
    (swaps,) = [part for part in values["parts"] if part["title"].endswith("another class")]
    assert [(case["image"], case["image_id"], case["path"]) for case in swaps["cases"]] == [
        (2, 102, "photos/<i>2.png")
    ]


def test_names_in_the_data_are_text(written):
    page = Page(written[0])
    assert "script" not in page.tags
    assert not {"i", "b", "u"} & {*page.tags}
    assert "image" in page.tags  # the heat map, by matplotlib
    assert page.text.count(HOSTILE[0][:20]) > 3  # names in plots are shortened
    assert "\x1b" not in written[0]
    assert "\u202e" not in written[0]
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]


def test_nothing_is_loaded_from_elsewhere(written):
    page = Page(written[0])
    links = [(tag, value) for tag, name, value in page.attributes if name in ("href", "xlink:href", "src")]
    assert len(links) > 20
    assert all(value.startswith(("data:image/", "#")) for _, value in links)
    assert not [tag for tag in page.tags if tag in ("link", "iframe", "object", "embed", "base")]
    assert "url(" not in written[0].replace("url(#", "")


def test_pictures_show_the_marks_where_they_are(written):
    page = Page(written[0])
    urls = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    pictures = [Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))) for url in urls]
    assert {picture.size for picture in pictures} == {(SIDE, 240)}
    differs = [np.abs(np.asarray(picture.convert("RGB")).astype(int)[120, 300] - BLUE).max() for picture in pictures]
    assert max(differs) < 40
    edge = [np.abs(np.asarray(picture.convert("RGB")).astype(int)[120, 40] - RED).max() for picture in pictures]
    assert max(edge) > 40  # the left side of a box


def test_large_images_are_cropped_around_the_box_in_question():
    box = np.array([[1500.0, 500, 1540, 540]])
    marks = Marks(names=["cat"], class_ids=[0], boxes=box)
    case = Case(image=0, caption="", predicted=marks, truth=marks, focus=box[0].tolist())
    (_, url), _ = CaseImages(source_of([(2000, 1000)]), [0]).pictures(case, 0)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")).astype(int)
    assert picture.shape == (SIDE, SIDE, 3)
    # The crop has 500 pixels around the middle of the box; all of it is in the blue half, but for the box.
    outline = np.abs(picture - BLUE).max(axis=2) > 60
    rows, columns = np.flatnonzero(outline.any(axis=1)), np.flatnonzero(outline.any(axis=0))
    middle, half = SIDE / 2, 20 * SIDE / 500
    assert columns[0] == pytest.approx(middle - half, abs=3)
    assert rows[-1] == pytest.approx(middle + half, abs=3)
