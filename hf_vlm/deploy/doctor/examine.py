"""All that is examined, in the order in which it is shown."""

from collections.abc import Iterator

from hf_vlm.deploy.doctor.finding import Finding
from hf_vlm.deploy.doctor.hub import HubCheck
from hf_vlm.deploy.doctor.machine import check_machine
from hf_vlm.deploy.doctor.packages import check_packages, check_torch

__all__ = ["examine"]


def examine() -> Iterator[Finding]:
    """Examines packages, machine, devices and the Hub, in a few seconds at most."""
    hub = HubCheck.start()  # which waits for the network meanwhile
    yield from check_packages()
    yield from check_machine()
    yield from check_torch()
    yield from hub.findings()
