"""A model repository of the Hugging Face Hub, brought to hold some files in one commit.

The token is the hub client's own: HF_TOKEN, or what ``hf auth login`` keeps. It is passed to the client alone, and
taken out of whatever a server answers before that is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import REMEDIES, UserError, log
from lora_dag.core.files import sha256_file
from lora_dag.formats import FORMATS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from stages.export.params import PushParams

FOLDERS = FORMATS
"""Below these the repository holds what was exported and nothing else."""
MAX_REASON = 300  # characters
REFUSALS = {
    401: "the token is not accepted; run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there; use one that may, or another repo_id",
    409: "it was changed meanwhile; push again",
    412: "it was changed meanwhile; push again",
}


def upload(target: PushParams, files: dict[str, Path], message: str) -> None:
    """Say what differs, then commit that.

    Args:
        files: name in the repository -> file.

    Raises:
        UserError: no token, a repository that others see otherwise than asked, or the Hub's own refusal.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    page = f"{api.endpoint}/{target.repo_id}"
    with one_line(page, ""):
        api.token = huggingface_hub.get_token()
    if not api.token:
        raise UserError(f"{page}: no token; run `hf auth login`, or set HF_TOKEN")
    with one_line(page, api.token):
        found = repository(api, target)
        there = {file.rfilename: file for file in found.siblings or []} if found else {}
        added = {name: path for name, path in files.items() if differs(path, there.get(name))}
        deleted = sorted(name for name in there if name.split("/")[0] in FOLDERS and name not in files)
        seen = "private" if target.private else "public"
        log.info("repository  %s (%s)", page, seen if found else f"new, {seen}")
        for name, path in added.items():
            log.info("upload      %s, %.1f kB", name, path.stat().st_size / 1e3)
        for name in deleted:
            log.info("delete      %s, which is exported no more", name)
        if not added and not deleted:
            log.info("nothing to do: it holds these %d files", len(files))
            return
        log.info("pushed      %s", commit(api, target, added, deleted, message, found.sha if found else None))


def repository(api: HfApi, target: PushParams) -> Any:
    """What the Hub says of the repository; None where there is none yet.

    Raises:
        UserError: it is public and should be private, or the other way round.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        found = api.model_info(target.repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    if bool(found.private) != target.private:
        is_now = "private" if found.private else "public"
        raise UserError(
            f"params.yaml export.push_to_hub.private: {str(target.private).lower()}, but {target.repo_id} is {is_now}; "
            f"change one of them: {api.endpoint}/{target.repo_id}/settings"
        )
    return found


def differs(path: Path, there: Any) -> bool:
    """Whether a file is another one than the repository's, by the digest that the Hub keeps of it."""
    if there is None or there.size != path.stat().st_size:
        return True
    if there.lfs is not None:
        return there.lfs.sha256 != sha256_file(path)
    data = path.read_bytes()  # small, or it would be in LFS
    return there.blob_id != hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit(
    api: HfApi, target: PushParams, added: dict[str, Path], deleted: list[str], message: str, parent: str | None
) -> str:
    """Make the repository if there is none; its new commit's address."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    if parent is None:
        api.create_repo(target.repo_id, private=target.private, exist_ok=True)
    operations: list[Any] = [
        *(CommitOperationAdd(name, path) for name, path in added.items()),
        *(CommitOperationDelete(name) for name in deleted),
    ]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # what the Hub says of the card
        info = api.create_commit(target.repo_id, operations, commit_message=message, parent_commit=parent)
    for warning in said:
        log.warning("warning: %s", " ".join(str(warning.message).split()))
    return info.commit_url


@contextlib.contextmanager
def one_line(page: str, token: str) -> Iterator[None]:
    """Inside, whatever the client raises becomes a UserError of one line, without a traceback that could tell more."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the client's HTTP library raises
        if getattr(error, "errno", None) in REMEDIES:  # the disk's fault
            raise
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(response, "status_code", 0)
        text = getattr(error, "server_message", None) or str(error) or type(error).__name__
        said = " ".join(text.replace(token, "***").split() if token else text.split())[:MAX_REASON].rstrip(".")
        remedy = REFUSALS.get(status, "refused" if status else "cannot be reached; push again")
        raise UserError(f"{page}: {remedy} ({said})") from None
