"""Whether the Hub can be reached, and who it takes the user for; the token itself is never shown."""

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_vlm.data.io.messages import one_line
from hf_vlm.deploy.doctor.finding import Finding

__all__ = ["HubCheck"]

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
SECONDS = 3.0


@dataclass
class HubCheck:
    """One request, which a thread waits for: name servers answer late, or never, and have no time limit of ours."""

    ask: Callable[[], dict[str, Any]]
    answer: dict[str, Any] = field(default_factory=dict)
    thread: threading.Thread | None = None

    @classmethod
    def start(cls) -> "HubCheck":
        """Begins to ask, unless the environment says that there is no Hub."""
        check = cls(ask_hub)
        if not offline_variables():
            check.thread = threading.Thread(target=check._run, daemon=True)
            check.thread.start()
        return check

    def _run(self) -> None:
        try:
            self.answer.update(self.ask())
        except Exception as error:  # of a client that may be broken itself
            self.answer["error"] = f"{type(error).__name__}: {error}"

    def findings(self) -> Iterator[Finding]:
        """What came of it, after at most `SECONDS`."""
        if self.thread is None:
            names = " and ".join(offline_variables())
            yield Finding("warning", f"{names} set: nothing is read from or sent to the Hub", f"unset {names}")
            return
        self.thread.join(SECONDS)
        yield finding_of(self.answer or {"error": f"no answer within {SECONDS:.0f} s"})


def offline_variables() -> list[str]:
    """The variables of the environment that forbid to ask the Hub."""
    return [name for name in OFFLINE if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")]


def ask_hub() -> dict[str, Any]:
    """`endpoint`, the `status` of its answer, whether there is a token, and the `user`'s name or None."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import build_hf_headers, get_session  # type: ignore[attr-defined]

    has_token = get_token() is not None
    response = get_session().get(f"{constants.ENDPOINT}/api/whoami-v2", headers=build_hf_headers(), timeout=SECONDS)
    user = response.json().get("name") if response.status_code == 200 else None
    return {"endpoint": constants.ENDPOINT, "status": response.status_code, "has_token": has_token, "user": user}


def finding_of(answer: dict[str, Any]) -> Finding:
    """The line of an answer of `ask_hub`, or of an `error`."""
    if "error" in answer:
        text = f"the Hub cannot be reached ({one_line(answer['error'])}); local data and models work without it"
        return Finding("warning", text, "check the network, HTTPS_PROXY and HF_ENDPOINT, or set HF_HUB_OFFLINE=1")
    text = f"the Hub at {one_line(answer['endpoint'])} answers"
    if answer["user"] is not None:
        return Finding("ok", f"{text}, logged in as {one_line(answer['user'])}")
    if not answer["has_token"]:
        return Finding("ok", f"{text}, no token: private and gated repositories and push need one", "hf auth login")
    if answer["status"] == 401:
        return Finding("warning", f"{text}, but does not accept the token", "hf auth login, or another HF_TOKEN")
    return Finding("warning", f"{text} with the status {answer['status']}", "try again later")
