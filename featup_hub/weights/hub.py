"""Downloads files of the Hugging Face Hub with its own library; failures give one clear error.

The library's cache, token, ``HF_HUB_OFFLINE``, ``HF_ENDPOINT`` and checks apply.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    force_download: bool = False,
) -> Path:
    """Returns a file of a Hub repository from the cache, after downloading it there if needed.

    The arguments are those of ``huggingface_hub.hf_hub_download``.

    Raises:
        ValueError: If ``repo_id`` is not a repository's name.
        RuntimeError: If the file is not cached and cannot be downloaded.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HFValidationError

    options: dict[str, Any] = {"token": token, "force_download": force_download}
    try:
        where = f"{repo_id} (revision {revision or 'main'}; there is no such folder)"
        with explained(f"{filename} of the Hub repository {where}"):
            return Path(hf_hub_download(repo_id, filename, revision=revision, **options))
    except HFValidationError:
        raise ValueError(
            f"a Hub repository is named owner/name; got {repo_id!r}, which is no folder either; "
            "check it"
        ) from None


@contextmanager
def explained(wanted: str) -> Iterator[None]:
    """Turns a failed download of the named thing into one RuntimeError that says what to do."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    # The library's own errors are OSErrors; some errors of its HTTP client are not converted.
    client: type[Exception] = HfHubHTTPError.__bases__[0]
    failures: tuple[type[Exception], ...] = (OSError, client, SafetensorError)
    try:
        yield
    except failures as error:
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        if getattr(error, "errno", None) in (errno.EACCES, errno.EROFS):
            reason += "; set HF_HUB_CACHE to a folder that takes new files"
        raise RuntimeError(
            f"needed {wanted}; the Hugging Face Hub's library says: {reason}. Do one of: run once "
            "with a connection and without HF_HUB_OFFLINE; copy the cache "
            f"{constants.HF_HUB_CACHE} from a machine that has the file, or delete the file there "
            "if it is damaged; fetch the file by other means and give its path, "
            "on the command line by --model NAME=FILE, in Python by "
            "backbone_weights=FILE. To fail at once next time, set HF_HUB_OFFLINE=1"
        ) from None
