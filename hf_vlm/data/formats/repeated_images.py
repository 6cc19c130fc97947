"""Tables with one object per row that repeat an image for each of its objects."""

from collections.abc import Hashable, Iterable

from hf_vlm.data.formats.columns import ColumnMap
from hf_vlm.data.io.messages import summarise

__all__ = ["check_repeated_images"]


def check_repeated_images(
    images: Iterable[Hashable], objects: Iterable[Hashable], rows: Iterable[int], columns: ColumnMap, source: object
) -> None:
    """Refuse rows with one object each that repeat an image: each would teach that its other objects are background.

    Copies of a row, with the same object, do no such harm.

    Args:
        images: What identifies the image of each row that has an object; None where nothing does. Later rows than the
            last of these are not looked at.
        objects: Box and class of each of these rows.
        rows: Their positions in the table.
        columns: Names in the table, for the message.
        source: Name of the source, for the message.

    Raises:
        ValueError: Two rows have one image and different objects.
    """
    first: dict[Hashable, tuple[Hashable, int]] = {}
    repeated = []
    for image, item, row in zip(images, objects, rows):
        known, earlier = first.setdefault(image, (item, row))
        if image is not None and known != item:
            repeated.append(f"row {row} that of row {earlier}")
    if repeated:
        fields = list(dict.fromkeys((*columns.objects.values(), *columns.sides)))
        pandas = f", as pandas does by table.groupby({columns.columns['image']!r})[{fields}].agg(list).reset_index()"
        raise ValueError(
            f"{source}: rows have one object each, and {len(repeated)} repeat the image of an earlier row: "
            f"{summarise(repeated)}. Each row is an example, which would teach that the other objects of its image "
            f"are background. Join the rows of an image into one with lists{pandas * columns.is_flat}; or name image "
            "files in a metadata.csv beside them, whose rows are joined"
        )
