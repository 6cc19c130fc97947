"""Accelerators: memory, power and links, of the makers' data sheets; their FLOP/s are in `training/meters.py`."""

from dataclasses import dataclass

from hf_vlm.models.nearest_name import did_you_mean
from hf_vlm.training.meters import listed_peak

__all__ = ["GPUS", "Gpu", "find_gpu"]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """An accelerator.

    Attributes:
        name: Its name, as in the table of peak FLOP/s.
        memory: Bytes.
        link: Bytes per second, in one direction, to the others of its node: NVLink, Infinity Fabric or PCIe.
        watts: Largest power of the board.
    """

    name: str
    memory: float
    link: float
    watts: float

    def peak(self, precision: str) -> float:
        """FLOP/s of dense products; ValueError where it has none of that precision."""
        found = listed_peak(self.name, precision)
        if found is None:
            raise ValueError(f"{self.name} has no products in {precision}: choose another precision or GPU.")
        return found


GPUS = {
    "a100": Gpu(name="A100", memory=80e9, link=300e9, watts=400),  # NVIDIA A100 80GB SXM data sheet
    "h100": Gpu(name="H100", memory=80e9, link=450e9, watts=700),  # NVIDIA H100 SXM data sheet
    "h200": Gpu(name="H200", memory=141e9, link=450e9, watts=700),  # NVIDIA H200 SXM data sheet
    "b200": Gpu(name="B200", memory=180e9, link=900e9, watts=1000),  # NVIDIA HGX B200 data sheet
    "l4": Gpu(name="L4", memory=24e9, link=32e9, watts=72),  # NVIDIA L4 data sheet; PCIe 4 x16
    "l40s": Gpu(name="L40S", memory=48e9, link=32e9, watts=350),  # NVIDIA L40S data sheet; PCIe 4 x16
    "a10g": Gpu(name="A10G", memory=24e9, link=32e9, watts=300),  # AWS G5; PCIe 4 x16
    "t4": Gpu(name="T4", memory=16e9, link=16e9, watts=70),  # NVIDIA T4 data sheet; PCIe 3 x16
    "rtx4090": Gpu(name="RTX 4090", memory=24e9, link=32e9, watts=450),  # NVIDIA Ada white paper; PCIe 4 x16
    "mi300x": Gpu(name="MI300X", memory=192e9, link=448e9, watts=750),  # AMD Instinct MI300X data sheet
}


def find_gpu(name: str) -> Gpu:
    """The accelerator of a name; ValueError with the nearest names where there is none."""
    key = name.lower().replace(" ", "").replace("-", "")
    if key not in GPUS:
        raise ValueError(f"gpu: {name!r} is not known{did_you_mean(key, GPUS) or '.'} There are: {', '.join(GPUS)}.")
    return GPUS[key]
