"""Names that the columns of the schema and the fields of objects have in sources, the likeliest first."""

from hf_vlm.data.formats.box_conventions import CENTERS, CORNERS, XYWH

__all__ = [
    "ANNOTATION_NAMES",
    "COLUMN_NAMES",
    "IMAGE_NAMES",
    "NUMBER_NAMES",
    "OBJECT_NAMES",
    "POLYGON_NAMES",
    "SIDE_NAMES",
    "SIZE_NAMES",
    "TABLE_NAMES",
]

IMAGE_NAMES = (
    "image",
    "img",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "picture",
    "image_bytes",
    "image_path",
    "file_name",
    "path",
)
COLUMN_NAMES = {
    "label": (
        *("label", "labels", "fine_label", "class"),
        *("label_name", "class_name", "category", "category_name", "class_label"),
    ),
    "text": ("text", "texts", "caption", "captions"),
    "objects": ("objects", "annotations"),
    "mask": ("mask", "semantic_mask", "annotation"),
    "instance_mask": ("instance_mask",),
    "image_id": ("image_id", "id"),
    "width": ("width", "image_width"),
    "height": ("height", "image_height"),
}
POLYGON_NAMES = ("segmentation", "segmentations", "segments", "polygon", "polygons", "rle", "rles")
OBJECT_NAMES = {
    "bbox": ("bbox", "bboxes", "boxes"),
    "category": (
        *("category", "categories", "category_id", "category_ids", "label", "labels", "class", "classes"),
        *("class_label", "class_id", "category_name", "class_name", "label_name", "labelname", "name"),
    ),
    "area": ("area", "areas"),
    "iscrowd": ("iscrowd", "is_crowd"),
    "segmentation": (*POLYGON_NAMES, "mask", "masks"),  # the last two are encoded images
}
SIDE_NAMES = (  # of boxes whose four numbers are fields of their own
    (CORNERS, ("xmin", "ymin", "xmax", "ymax")),
    (CORNERS, ("x_min", "y_min", "x_max", "y_max")),
    (CORNERS, ("x1", "y1", "x2", "y2")),
    (CORNERS, ("left", "top", "right", "bottom")),
    (CORNERS, ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2")),
    (XYWH, ("bbox_x", "bbox_y", "bbox_width", "bbox_height")),
    (XYWH, ("x", "y", "w", "h")),
    (XYWH, ("x", "y", "width", "height")),
    (XYWH, ("left", "top", "width", "height")),
    (CENTERS, ("x_center", "y_center", "width", "height")),
    (CENTERS, ("cx", "cy", "w", "h")),
)
SIZE_NAMES = frozenset((*COLUMN_NAMES["width"], *COLUMN_NAMES["height"]))
NUMBER_NAMES = frozenset((*SIZE_NAMES, *OBJECT_NAMES["area"], *(name for _, sides in SIDE_NAMES for name in sides)))
# All names of annotations; columns with the telling ones among them are named where they are not read.
TABLE_NAMES = frozenset(
    name
    for names in (*COLUMN_NAMES.values(), *OBJECT_NAMES.values(), *(sides for _, sides in SIDE_NAMES))
    for name in names
)
ANNOTATION_NAMES = TABLE_NAMES - SIZE_NAMES - {"id", "image_id", "name", "area", "areas"} - {*COLUMN_NAMES["text"]}
ANNOTATION_NAMES -= {*"xywh", "cx", "cy", "left", "top", "right", "bottom"}
ANNOTATION_NAMES |= {"segmentation", "segments", "polygon", "polygons", "keypoints", "rle"}
