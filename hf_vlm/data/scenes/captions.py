"""Captions of scenes, true by construction, and others that differ in one word and are false."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hf_vlm.data.scenes.canvas import Scene
from hf_vlm.data.scenes.render import SceneSettings

__all__ = ["KINDS", "hard_negatives", "scene_captions"]

Array = np.ndarray[Any, Any]

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
MIN_DISTANCE = 0.1  # of the image's side, between centres of what is called left of or above


@dataclass(frozen=True)
class Group:
    """The objects of a scene that have one class and one colour."""

    count: int
    name: str
    color: str = ""

    def __str__(self) -> str:
        words = [word for word in (self.color, self.name) if word]
        if self.count == 1:
            return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])
        plural = words[-1] + ("es" if words[-1].endswith("x") else "s")
        return " ".join([NUMBERS[self.count] if self.count < len(NUMBERS) else str(self.count), *words[:-1], plural])


@dataclass(frozen=True)
class Description:
    """What is in a scene; of two groups perhaps also how the first lies to the second."""

    groups: tuple[Group, ...]
    relation: str = ""

    def __str__(self) -> str:
        if self.relation:
            return f"{self.groups[0]} {self.relation} {self.groups[1]}"
        *others, last = map(str, self.groups)
        return f"{', '.join(others)} and {last}" if others else last


def scene_captions(scene: Scene, settings: SceneSettings) -> list[str]:
    """The captions of a scene: what is in it and, where two groups lie apart, how they lie to each other.

    As in "two red sevens and a blue three" and "two red sevens left of a blue three".
    """
    return [str(description) for description in _describe(scene, settings)]


def hard_negatives(scene: Scene, settings: SceneSettings, rng: np.random.Generator) -> dict[str, tuple[str, str]]:
    """By the kind of the difference, a caption of the scene and a false one that differs in nothing else.

    Args:
        scene: The scene.
        settings: What it was rendered by.
        rng: Chooses what is changed.

    Returns:
        Those of `KINDS` that the scene allows: `color` and `relation` need two groups, and `color` names of colours.
    """
    *_, description = _describe(scene, settings)  # with the relation, where there is one
    found = {kind: change(description, settings, rng) for kind, change in KINDS.items()}
    return {kind: (str(description), str(false)) for kind, false in found.items() if false is not None}


def _describe(scene: Scene, settings: SceneSettings) -> Iterator[Description]:
    keys = list(zip(scene.categories.tolist(), scene.colors.tolist()))
    order = sorted(dict.fromkeys(keys))
    groups = [Group(keys.count(key), _word(settings, key[0]), _color(settings, key[1])) for key in order]
    yield Description(tuple(groups))
    if len(order) == 2:
        centers = scene.boxes[:, :2] + scene.boxes[:, 2:] / 2  # (n, 2) x and y in pixels
        is_first = np.array([key == order[0] for key in keys])
        relation = _relation(centers[is_first], centers[~is_first], MIN_DISTANCE * settings.image_size)
        if relation:
            yield Description(tuple(groups), relation)


def _word(settings: SceneSettings, category: int) -> str:
    name = settings.class_names[category]
    return NUMBERS[int(name)] if name.isdecimal() else name


def _color(settings: SceneSettings, color: int) -> str:
    return settings.color_names[color] if color >= 0 else ""


def _relation(first: Array, second: Array, at_least: float) -> str:
    """How all centres (n, 2) of one group lie to all (m, 2) of another, along the axis on which they are farther."""
    distances = {
        "left of": second[:, 0].min() - first[:, 0].max(),
        "right of": first[:, 0].min() - second[:, 0].max(),
        "above": second[:, 1].min() - first[:, 1].max(),
        "below": first[:, 1].min() - second[:, 1].max(),
    }
    relation = max(distances, key=distances.__getitem__)
    return relation if distances[relation] >= at_least else ""


def _swap_colors(description: Description, settings: SceneSettings, rng: np.random.Generator) -> Description | None:
    """The colours of two groups of different classes exchanged: the same words in another order."""
    if len(description.groups) != 2:
        return None
    first, second = description.groups
    if first.color == second.color or first.name == second.name:
        return None
    groups = replace(first, color=second.color), replace(second, color=first.color)
    return replace(description, groups=groups)


def _change_class(description: Description, settings: SceneSettings, rng: np.random.Generator) -> Description | None:
    """One group of a class that the scene does not have."""
    present = {group.name for group in description.groups}
    absent = [word for index in range(settings.num_classes) if (word := _word(settings, index)) not in present]
    return _replace_one(description, rng, name=absent[rng.integers(len(absent))]) if absent else None


def _change_count(description: Description, settings: SceneSettings, rng: np.random.Generator) -> Description:
    """One object more in a group, or one less."""
    index = int(rng.integers(len(description.groups)))
    count = description.groups[index].count
    return _replace_one(description, rng, index, count=count + 1 if count == 1 or rng.random() < 0.5 else count - 1)


def _turn_relation(description: Description, settings: SceneSettings, rng: np.random.Generator) -> Description | None:
    return replace(description, relation=OPPOSITES[description.relation]) if description.relation else None


def _replace_one(
    description: Description, rng: np.random.Generator, index: int | None = None, **changes: Any
) -> Description:
    groups: Sequence[Group] = description.groups
    index = int(rng.integers(len(groups))) if index is None else index
    changed = replace(groups[index], **changes)
    return replace(description, groups=(*groups[:index], changed, *groups[index + 1 :]))


KINDS: dict[str, Callable[[Description, SceneSettings, np.random.Generator], Description | None]] = {
    "class": _change_class,
    "color": _swap_colors,
    "count": _change_count,
    "relation": _turn_relation,
}
