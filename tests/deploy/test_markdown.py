"""Names from data are shown in cards as they are, and make nothing there."""

import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_vlm.deploy.markdown import code_span, fence_of, markdown
from hf_vlm.deploy.model_card import write_model_card

HOSTILE = [
    "cat\n\n## Results\n\n| AP | 0.99 |\n|---|---|",
    "<script>alert(1)</script>",
    "![x](https://evil.example/pixel.png)",
    "[click](javascript:alert(1))",
    "`code` *bold* _it_ ~~gone~~ $x$ <!-- -->",
    "\x1b[2Jgone\x07",
    "half \ud83d of a pair",
    "https://evil.example and www.evil.example",
    "---",
    "```\n## Results",
]


def test_text_that_is_plain_stays():
    for name in ("cat", "my_class_2", "Käse (mit Löchern), 5 %", "AP (IoU 0.50:0.95)", "2 CPU cores", "a-b.c/d", "猫"):
        assert markdown(name) == name
        assert code_span(name) == f"`{name}`"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("<b>&", "&lt;b&gt;&amp;"),
        ("![x](http://h)", r"!\[x\](http\://h)"),
        ("a\n# b\t c", "a # b c"),
        ("_a_ a_b", r"\_a\_ a_b"),
        ("`a` *b* |c| ~d~ $e$ \\f", r"\`a\` \*b\* \|c\| \~d\~ \$e\$ \\f"),
        ("www.h.de", r"www\.h.de"),
        ("\x1b[2J\ud83d", r"\\x1b\[2J\\ud83d"),
    ],
)
def test_what_makes_something_is_escaped(name, expected):
    assert markdown(name) == expected


def test_code_holds_any_backticks():
    assert code_span("a``b") == "```a``b```"
    assert code_span("`a") == "`` `a ``"
    assert code_span("a\n\n`b") == "``a `b``"
    assert fence_of("a") == "```"
    assert fence_of("a: |\n ````\n") == "`````"


def test_names_of_classes_and_runs_make_nothing_in_a_card(detector_run):
    run = json.loads((detector_run / "run.json").read_text())
    expected = write_model_card(detector_run).read_text()
    run["data"] |= {"class_names": HOSTILE, "source": "/data/" + "`<code>![x](y)", "split": "a`\n## Results"}
    run["metrics"] |= {f"ap/{name}": 0.25 for name in HOSTILE}
    run["versions"] |= {name: name for name in HOSTILE}
    run["machine"] = run["git"]["commit"] = HOSTILE[0]
    (detector_run / "run.json").write_text(json.dumps(run))
    recipe = {"data": "x", "eval_split": "`\n## Results", "note": "a\n```\n## Results\n"}
    (detector_run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((detector_run / "config.json").read_text())
    config["auto_map"] = {"AutoModelFor\n```\n## Results": "x.y"}
    (detector_run / "config.json").write_text(json.dumps(config))

    text = write_model_card(detector_run).read_text()
    body = re.sub(r"^---\n.*?\n---\n", "", text, count=1, flags=re.DOTALL)
    outside_code = re.sub(r"^(```+)\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    assert re.findall(r"^#+ .*$", outside_code, re.MULTILINE) == re.findall(r"^#+ .*$", expected, re.MULTILINE)
    assert set(re.findall(r"<[!\w/]+", outside_code)) == set(re.findall(r"<[!\w/]+", expected)) | {"<code"}
    assert "`` `<code>![x](y) ``" in outside_code  # code shows it
    assert not re.search(r"(?<!\\)\]\((?!https://huggingface)", outside_code.replace("`<code>![x](y)", ""))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)
    results = ModelCard.load(detector_run / "README.md").data.eval_results
    assert len(results) == 2 + len(HOSTILE)
