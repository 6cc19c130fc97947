"""Whether images of 16 bits use their range: those that do not are nearly black to a model, and have a few levels."""

import itertools
import logging

from hf_vlm.data.io.decode import BadImageError, read_image_bytes, used_bits
from hf_vlm.data.source import Source

__all__ = ["MAX_DARK_BITS", "check_pixel_range"]

logger = logging.getLogger(__name__)

NUM_SAMPLED = 16  # images, from the first on
MIN_CERTAIN = 10  # images; of fewer ones chance may decide
MAX_DARK_BITS, MAX_CERTAIN_BITS = 14, 12  # of 16; they leave 64 and 16 of 256 levels


def check_pixel_range(source: Source) -> None:
    """Look at the first images of a source, and warn where all that have 16 bits use a quarter of their range or less.

    Raises:
        ValueError: There are ten or more of these, and all use a sixteenth or less, as cameras of 12 and 10 bits do.
    """
    found = []
    for example in itertools.islice(source, NUM_SAMPLED):
        try:
            found.append(used_bits(read_image_bytes(example["image"])))
        except BadImageError:
            continue  # training counts and names it
    used = [bits for bits in found if bits]  # black ones show nothing
    if not used or max(used) > MAX_DARK_BITS:
        return
    finding = (
        f"{source.name}: the first {len(used)} images of 16 bits have no value above {2 ** max(used) - 1}: decoded "
        f"they have {max(2 ** max(used) // 256, 1)} of 256 levels and are nearly black. Scale them to the whole range "
        f"of 16 bits, all by one factor, such as {2 ** (16 - max(used))}"
    )
    if len(used) >= MIN_CERTAIN and max(used) <= MAX_CERTAIN_BITS:
        raise ValueError(finding)
    logger.warning(finding)
