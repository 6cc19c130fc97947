"""What is sent to the Hub, shown before it is sent, and the repository that it is sent to."""

import fnmatch
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled, RevisionNotFoundError

from hf_vlm.data.io.messages import one_line

__all__ = ["RepoType", "Repository", "Upload", "describe_files", "format_size", "hub_errors", "refuse_tokens"]

RepoType = Literal["model", "dataset", "space"]

TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{20,}\b")
MAX_TEXT = 16 * 2**20  # bytes; weights are larger, and hold no tokens


@dataclass(frozen=True)
class Upload:
    """Files for a repository.

    Args:
        files: Files on disk, or their content, by path in the repository.
        stale: Patterns of files from earlier uploads, which are deleted where they are not among `files`.
    """

    files: Mapping[str, Path | bytes]
    stale: Sequence[str] = ()

    def sizes(self) -> dict[str, int]:
        """Size in bytes of each file, by path in the repository."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


class Repository:
    """A repository on the Hub that this token may write to.

    Attributes:
        id: `owner/name`.
        address: URL of its page, of the branch where one was given.
    """

    def __init__(
        self, repo_id: str, *, type: RepoType = "model", private: bool = False, revision: str | None = None
    ) -> None:
        """Creates it where it does not exist.

        Args:
            private: Whether it must be private.
            revision: Branch to send to, created where it does not exist; the main branch by default.

        Raises:
            ValueError: There is no token, it is public but must be private, or what `hub_errors` turns into one.
        """
        with hub_errors(repo_id):
            if get_token() is None:
                raise ValueError("There is no Hugging Face token: run `hf auth login`, or set HF_TOKEN.")
            self.api = HfApi(library_name="hf_vlm")
            sdk = "gradio" if type == "space" else None
            url = self.api.create_repo(repo_id, repo_type=type, private=private or None, exist_ok=True, space_sdk=sdk)
            self.id, self.type, self.revision = url.repo_id, type, revision
            self.address = f"{url}/tree/{revision}" if revision else str(url)
            if private and not self.api.repo_info(self.id, repo_type=type).private:
                raise ValueError(f"{self.id} exists and is public: make it private in its settings, or push without.")
            if revision is not None:
                self.api.create_branch(self.id, branch=revision, repo_type=type, exist_ok=True)

    def send(self, upload: Upload, *, message: str) -> str:
        """Commits an upload; only content that the Hub does not have is sent. Returns the commit's id.

        Raises:
            ValueError: What `hub_errors` turns into one.
        """
        additions = [self.prepare(name, content) for name, content in upload.files.items()]
        return self.commit(additions, stale=upload.stale, message=message)

    def read_text(self, name: str) -> str | None:
        """The text of a file of the repository; None where it has no such file.

        Raises:
            ValueError: What `hub_errors` turns into one.
        """
        with hub_errors(self.id):
            if not self.api.file_exists(self.id, name, repo_type=self.type, revision=self.revision):
                return None
            path = self.api.hf_hub_download(self.id, name, repo_type=self.type, revision=self.revision)
            return Path(path).read_text(encoding="utf-8")

    def prepare(self, name: str, content: Path | bytes) -> CommitOperationAdd:
        """A file to be committed."""
        return CommitOperationAdd(path_in_repo=name, path_or_fileobj=content)

    def send_ahead(self, addition: CommitOperationAdd) -> None:
        """Sends a large file before it is committed, and frees its memory; the Hub keeps it for a later attempt.

        Raises:
            ValueError: What `hub_errors` turns into one.
        """
        with hub_errors(self.id):
            self.api.preupload_lfs_files(
                self.id, [addition], repo_type=self.type, revision=self.revision, free_memory=True
            )

    def commit(
        self,
        additions: Sequence[CommitOperationAdd],
        *,
        stale: Sequence[str] = (),
        kept: Collection[str] = (),
        message: str,
    ) -> str:
        """Commits files, and deletes others. Returns the commit's id.

        Args:
            stale: Patterns of the names of files to delete.
            kept: Names of files that are not deleted, beside those of `additions`.

        Raises:
            ValueError: What `hub_errors` turns into one.
        """
        kept = {*kept, *(addition.path_in_repo for addition in additions)}
        with hub_errors(self.id), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            there = self.api.list_repo_files(self.id, repo_type=self.type, revision=self.revision) if stale else []
            deletions = [
                CommitOperationDelete(path_in_repo=name)
                for name in there
                if name not in kept and any(fnmatch.fnmatchcase(name, pattern) for pattern in stale)
            ]
            commit = self.api.create_commit(
                self.id,
                [*additions, *deletions],
                commit_message=message,
                repo_type=self.type,
                revision=self.revision,
            )
        return commit.oid


def refuse_tokens(files: Mapping[str, Path | bytes]) -> None:
    """Refuses to publish a file, other than weights, that holds a Hugging Face token.

    Raises:
        ValueError: One does.
    """
    for name, content in files.items():
        if isinstance(content, Path):
            content = content.read_bytes() if content.stat().st_size <= MAX_TEXT else b""
        if TOKEN.search(content):
            raise ValueError(f"{name} holds what looks like a Hugging Face token: remove it before pushing.")


def describe_files(sizes: Mapping[str, int]) -> str:
    """A table of files and their sizes in bytes, with the total."""
    rows = [f"  {format_size(size):>10}  {one_line(name)}" for name, size in sorted(sizes.items())]
    return "\n".join([*rows, f"  {format_size(sum(sizes.values())):>10}  in {len(sizes)} files"])


def format_size(num_bytes: float) -> str:
    """A number of bytes with its decimal unit, as the Hub shows it."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


@contextmanager
def hub_errors(repo_id: str) -> Iterator[None]:
    """Turns the Hub client's errors into what the user can do about them."""
    try:
        yield
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is not a name that the Hub accepts: {error}") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{repo_id} has no such branch: {error.server_message or error}") from error
    except HfHubHTTPError as error:
        status, text = error.response.status_code, error.server_message or str(error)
        if status == 401:
            message = f"The Hub does not accept the token ({text}): run `hf auth login`, or set HF_TOKEN."
        elif status in (403, 404):
            owner = repo_id.split("/")[0]
            message = f"The token may not write to {repo_id} ({text}): use a token with write access to {owner!r}."
        else:
            message = f"The Hub refused {repo_id} with status {status}: {text}"
        raise ValueError(message) from error
    except (httpx2.TransportError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"The Hub cannot be reached: {error}. Check the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        ) from error
