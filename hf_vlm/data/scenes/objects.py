"""What scenes require of the things that are painted into them, and the table of those there are."""

from typing import ClassVar, Protocol

import numpy as np

from hf_vlm.data.scenes.canvas import Array, Finish, Shape
from hf_vlm.data.scenes.digits import Digits
from hf_vlm.data.scenes.symbols import Symbols

__all__ = ["OBJECTS", "Objects", "SceneObject"]


class SceneObject(Protocol):
    """One object, which may be shown at any size and angle."""

    @property
    def category(self) -> int:
        """Index of its class."""

    def pose(self, size: float, angle: float, *, shift: Array | float = 0.0) -> Shape:
        """The object in a square of odd side, `shift` (2,) pixels off its centre, turned by `angle` degrees."""


class Objects(Protocol):
    """The objects of a split."""

    names: ClassVar[tuple[str, ...]]  # of the classes
    origin: ClassVar[str]  # where they are from
    max_extent: ClassVar[float]  # longest side of a cropped shape at any angle, relative to its size

    def __init__(self, split: str) -> None: ...

    def sample(self, rng: np.random.Generator, num_classes: int) -> SceneObject:
        """An object of one of the first classes."""

    def sample_finish(self, rng: np.random.Generator, below: Array, contrast: tuple[float, float]) -> Finish:
        """A finish whose brightness differs by `contrast`, in 0..1, from the colour (3,) below, 0..255."""

    def plain_finish(self, color: Array) -> Finish:
        """A finish of one colour (3,), in 0..255."""


OBJECTS: dict[str, type[Objects]] = {"digits": Digits, "symbols": Symbols}
