"""Upload of files to a model repository of the Hugging Face Hub, in one commit.

The token is the one of the Hub's client: HF_TOKEN, or the login of ``hf auth login``. Only the client gets it. It is
removed from every server message before the message is shown.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_dag.core.console import REMEDIES, Problem, UserError, log, warn
from lora_dag.core.files import sha256_file
from lora_dag.formats import FORMATS

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from stages.export.params import ExportParams, PushParams

FOLDERS = (*FORMATS, "resized")
"""Folders of the repository whose files are deleted if they are not in the present export."""
MAX_REASON = 300  # characters
STATUS_PROBLEMS = {
    401: Problem("token-rejected", "the Hub rejects the token. Run `hf auth login`, or set HF_TOKEN"),
    403: Problem("token-without-access", "the token has no write access. Use another token or another repo_id"),
    409: Problem("repository-changed", "the repository was changed during the upload. Push again"),
    412: Problem("repository-changed", "the repository was changed during the upload. Push again"),
}
"""HTTP status -> problem."""
UPLOAD_REFUSED = Problem("upload-refused", "the Hub refuses the upload")
HUB_UNREACHABLE = Problem("hub-unreachable", "the Hub cannot be reached. Push again")


def upload(settings: ExportParams, files: dict[str, Path], message: str) -> None:
    """Log and commit the differences between the repository and the files.

    Args:
        files: name in the repository -> file.

    Raises:
        UserError: there is no token, the repository has another visibility, or the Hub refuses the upload.
    """
    import huggingface_hub

    target = settings.push_to_hub
    assert target is not None
    api = huggingface_hub.HfApi()
    page = f"{api.endpoint}/{target.repo_id}"
    with errors_in_one_line(page, ""):
        api.token = huggingface_hub.get_token()
    if not api.token:
        raise UserError(Problem("token-missing", f"{page}: there is no token. Run `hf auth login`, or set HF_TOKEN."))
    with errors_in_one_line(page, api.token):
        repository = find_repository(api, target, settings.setting("push_to_hub.private"))
        remote = {file.rfilename: file for file in repository.siblings or []} if repository else {}
        added = {name: path for name, path in files.items() if differs(path, remote.get(name))}
        deleted = sorted(name for name in remote if name.split("/")[0] in FOLDERS and name not in files)
        visibility = "private" if target.private else "public"
        log.info("repository  %s (%s)", page, visibility if repository else f"new, {visibility}")
        for name, path in added.items():
            log.info("upload      %s, %.1f kB", name, path.stat().st_size / 1e3)
        for name in deleted:
            log.info("delete      %s, which is no longer exported", name)
        if not added and not deleted:
            log.info("up to date  the repository has the same %d files", len(files))
            return
        log.info("pushed      %s", commit(api, target, added, deleted, message, repository.sha if repository else None))


def find_repository(api: HfApi, target: PushParams, setting: str) -> Any:
    """Return the Hub's record of the repository; None if it does not exist yet.

    Args:
        setting: place of the setting ``private`` for a message.

    Raises:
        UserError: the repository has another visibility.
    """
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        repository = api.model_info(target.repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    if bool(repository.private) != target.private:
        visibility = "private" if repository.private else "public"
        remedy = f"Change one of them: {api.endpoint}/{target.repo_id}/settings"
        raise UserError(
            Problem(
                "repository-visibility",
                f"{setting}: got {str(target.private).lower()}, but {target.repo_id} is {visibility}. {remedy}",
            )
        )
    return repository


def differs(path: Path, remote: Any) -> bool:
    """Return whether a file differs from the repository's, by the digest that the Hub records."""
    if remote is None or remote.size != path.stat().st_size:
        return True
    if remote.lfs is not None:
        return remote.lfs.sha256 != sha256_file(path)
    data = path.read_bytes()  # small, or it would be in LFS
    return remote.blob_id != hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def commit(
    api: HfApi, target: PushParams, added: dict[str, Path], deleted: list[str], message: str, parent: str | None
) -> str:
    """Create the repository if necessary, commit, and return the address of the commit."""
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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)  # the Hub's remarks on the model card
        info = api.create_commit(target.repo_id, operations, commit_message=message, parent_commit=parent)
    for warning in caught:
        warn("hub-warning", " ".join(str(warning.message).split()))
    return info.commit_url


@contextlib.contextmanager
def errors_in_one_line(page: str, token: str) -> Iterator[None]:
    """Turn every error of the client inside the block into a UserError of one line, without the token."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # whatever the client's HTTP library raises
        if getattr(error, "errno", None) in REMEDIES:  # an error of the disk
            raise
        response = getattr(error, "response", None) or getattr(error.__cause__, "response", None)
        status = getattr(response, "status_code", 0)
        text = getattr(error, "server_message", None) or str(error) or type(error).__name__
        reason = " ".join(text.replace(token, "***").split() if token else text.split())[:MAX_REASON].rstrip(".")
        problem = STATUS_PROBLEMS.get(status, UPLOAD_REFUSED if status else HUB_UNREACHABLE)
        raise UserError(Problem(problem.code, f"{page}: {problem} ({reason}).")) from None
