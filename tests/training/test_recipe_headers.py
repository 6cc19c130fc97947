"""The header of each recipe lists everything in which it, and the code, differ from the official implementation."""

import dataclasses
import enum
import re

import pytest
from official_settings import OFFICIAL, RUN_KEYS, SHAPE_KEYS, WITHOUT_OFFICIAL

from hf_vlm.data.transforms.classification import ClassificationSettings
from hf_vlm.data.transforms.detection import DetectionSettings
from hf_vlm.data.transforms.segmentation import SegmentationSettings
from hf_vlm.data.transforms.views import ViewSettings
from hf_vlm.registry import find_model
from hf_vlm.training.build import build_config
from hf_vlm.training.recipe import LAUNCHERS, load_recipe, parse_arguments, parse_overrides, shipped_folder

RECIPES = [path for path in sorted(shipped_folder("recipes").glob("*/*.yaml")) if path.parent.name not in LAUNCHERS]
WINDOWS = {
    "detection": DetectionSettings,
    "instance_segmentation": DetectionSettings,
    "semantic_segmentation": SegmentationSettings,
    "mask_query_segmentation": SegmentationSettings,
}
ONE = re.compile(r"deviation: ([^:]+): official (.+), here (.+?) \(.+\)")
SEVERAL = re.compile(r"deviations \([^)]+\): (.+)")


def listed(header):
    """Deviations of a header: name -> (official, here) as text; without values where several share one line."""
    lines = re.sub(r"\n#   +", " ", header).removeprefix("# ").split("\n# ")  # lines that go on are indented
    found = {}
    for line in lines:
        if line.startswith("deviation:"):
            name, official, here = ONE.fullmatch(line).groups()
            found[name] = official, here
        elif line.startswith("deviations"):
            found |= dict.fromkeys(SEVERAL.fullmatch(line).group(1).split(", "))
    return found


def plain(value):
    if isinstance(value, enum.Enum):
        return value.value.removesuffix("_torch_fused")  # of AdamW
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


class Settings:
    """What a recipe and all defaults behind it come to, by dotted key."""

    def __init__(self, recipe):
        entry = find_model(recipe["method"])
        without_scaling = {key: value for key, value in recipe.items() if key != "reference_batch_size"}
        args = parse_arguments(recipe | {"use_cpu": True})
        self.args = args
        self.config = build_config(parse_arguments(without_scaling | {"use_cpu": True}), entry)
        self.is_pretraining = entry.task == "pretraining"
        if self.is_pretraining:
            views = {**entry.model_class.default_views, "size": args.image_hw, **args.views}
            names = [field.name for field in dataclasses.fields(ViewSettings)]
            shared = {name: value for name, value in views.items() if name in names}
            self.views = dataclasses.asdict(ViewSettings(**shared)) | views
            if "local" in views:
                self.views["local"] = {**shared, **views["local"]}
        elif recipe["method"] in WINDOWS:
            self.augmentation = dataclasses.asdict(WINDOWS[recipe["method"]](**args.augmentation))
        else:
            settings = ClassificationSettings.from_dict(args.augmentation, size=args.image_hw)
            parts = dataclasses.asdict(settings)
            self.augmentation = {**parts.pop("view"), **parts.pop("mix"), **parts}

    def __getitem__(self, key):
        if key == "momentum follows the batch":
            return bool(self.config.batch_scaled_momentum) and self.args.reference_batch_size is not None
        if key == "length":
            return self.args.images_to_see or f"{self.args.max_steps} steps"
        first, *rest = key.split(".")
        value = {
            "model_config": self.config,
            "encoder_config": self.config.backbone_config,
            "views": getattr(self, "views", None),
            "augmentation": getattr(self, "augmentation", None),
        }.get(first, self.args)
        for name in rest or [first]:
            value = value[name] if isinstance(value, dict) else getattr(value, name)
        return plain(value)


def flat(values, prefix=""):
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def deviations(recipe):
    """All of them: name -> (official value, ours)."""
    official, settings = OFFICIAL[recipe["method"]], Settings(recipe)
    pairs = {key: (value, settings[key]) for file in official.settings.values() for key, value in file.items()}
    found = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return found | {name: pair for file in official.code.values() for name, pair in file.items()}


def same(text, value):
    return value in (text, parse_overrides([f"--value={text}"])[0][1])  # read as recipes are


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_headers_list_all_deviations_and_no_other(path, tmp_path):
    recipe = load_recipe(path) | {"output_dir": str(tmp_path)}
    header = path.read_text().split("\nmethod:")[0]
    if recipe["method"] in WITHOUT_OFFICIAL:
        assert not listed(header)
        return
    expected, found = deviations(recipe), listed(header)
    assert sorted(found) == sorted(expected)
    for name, texts in found.items():
        if texts is not None:
            assert all(map(same, texts, expected[name])), f"{name}: {texts} are not {expected[name]}"
    known = {key for file in OFFICIAL[recipe["method"]].settings.values() for key in file}
    assert set(flat(recipe)) - {*RUN_KEYS, *SHAPE_KEYS} <= known  # no key is compared with nothing
