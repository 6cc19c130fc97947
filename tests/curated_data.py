"""Pictures for curation, and copies of them."""

import cv2
import numpy as np

from hf_vlm.curation.measure import Reason


def picture(seed, height=60, width=80):
    """Smooth colours and some texture, (height, width, 3) uint8, unlike those of other seeds."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3)).astype(np.uint8)
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    return np.clip(image + rng.integers(-9, 10, image.shape), 0, 255).astype(np.uint8)


def encoded(image, extension=".png", *options):
    return cv2.imencode(extension, image[:, :, ::-1], options)[1].tobytes()


def jpeg(image):
    return encoded(image, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 60)


def smaller(image):
    return encoded(cv2.resize(image, (60, 45), interpolation=cv2.INTER_AREA))


def larger(image):
    return encoded(cv2.resize(image, (120, 90), interpolation=cv2.INTER_CUBIC))


def cropped(image):
    return encoded(image[2:-2, 2:-3])


# Row of a copy: row of the original, and how it is made. Of 9 the copy is larger, and so the one that stays.
COPIES = {
    3: (0, lambda image: encoded(image, ".png", cv2.IMWRITE_PNG_COMPRESSION, 0)),  # other bytes, the same pixels
    14: (0, encoded),
    20: (1, jpeg),
    21: (2, smaller),
    30: (4, cropped),
    31: (9, larger),
}
# Row: reason to be dropped, and the image.
OTHERS = {
    5: (Reason.UNREADABLE, b"no image"),
    6: (Reason.SMALL, encoded(picture(50, 30, 60))),
    17: (Reason.ASPECT, encoded(picture(51, 40, 200))),
    25: (Reason.BLANK, encoded(np.full((50, 50, 3), 77, np.uint8))),
    26: (Reason.BLURRED, encoded(cv2.GaussianBlur(picture(52, 60, 80), (0, 0), 12))),
}
# Of the exact copies that of most bytes stays, which is row 3; of the pair with 9 the larger, 31.
REASONS = {0: Reason.EXACT, 14: Reason.EXACT, 20: Reason.NEAR, 21: Reason.NEAR, 30: Reason.NEAR, 9: Reason.NEAR}
REASONS |= {row: reason for row, (reason, _) in OTHERS.items()}
