"""Files of the Hugging Face Hub: the cache first, then the network, within bounds.

The Hub's own library does the transfer, so its cache, token, ``HF_HUB_OFFLINE`` and
``HF_ENDPOINT`` apply. Added here: a broken or lying server costs a few tries and one clear
error, and what it sent does not stay in the cache.
"""

from __future__ import annotations

import re
import time
from inspect import signature
from pathlib import Path
from typing import Any

from featup_hub.weights.files import digest

__all__ = ["cached_digest", "download"]

_TRIES = 3
_SHA256 = re.compile(r"[0-9a-f]{64}")


def download(
    repo_id: str,
    filename: str,
    *,
    revision: str | None = None,
    sha256: str | None = None,
    token: str | bool | None = None,
    refresh: bool = False,
) -> Path:
    """Finds a file of a Hub repository in the cache, or downloads it there.

    Args:
        repo_id: Repository, ``owner/name``.
        filename: File in it.
        revision: Commit, tag or branch; default: the main branch. Once cached, a branch is not
            looked up again.
        sha256: Digest a download must have; default: the one the server names.
        token: Access token; default: the one the Hub's library finds.
        refresh: Ask the server even if the file is cached.

    Returns:
        The file in the cache.

    Raises:
        ValueError: If a name is not one of a repository or of a file in it.
        RuntimeError: If the file is neither cached nor to be had, or not the one announced.
    """
    import huggingface_hub as hub
    from huggingface_hub import constants

    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", repo_id, re.ASCII) or ".." in repo_id:
        raise ValueError(
            f"a Hub repository is named owner/name; got {repo_id!r}, which is no folder either; "
            "check it"
        )
    check_name("file", filename)
    check_name("revision", revision or "main")
    cached = None if refresh else hub.try_to_load_from_cache(repo_id, filename, revision=revision)
    if isinstance(cached, str):
        return _inside_cache(Path(cached))
    wanted = f"{filename} of {repo_id} (revision {revision or 'main'})"
    if constants.HF_HUB_OFFLINE:
        raise _unavailable(wanted, repo_id, filename, revision, "HF_HUB_OFFLINE is set")
    try:
        size, etag = _announcement(repo_id, filename, revision, token)
        path = _inside_cache(_transfer(repo_id, filename, revision, token, size, refresh))
    except Exception as error:  # the HTTP client under the Hub's library changes with its versions
        reason = f"the Hub's answer was: {_flat(error)}"
        raise _unavailable(wanted, repo_id, filename, revision, reason) from None
    expected = sha256 or (etag if _SHA256.fullmatch(etag) else None)
    if expected is not None and (found := digest(path)) != expected.lower():
        forget(path)
        raise RuntimeError(
            f"{wanted} came with sha256 {found}, needed {expected}; it was removed from the "
            "cache; try again, or check HF_ENDPOINT: the server or something on the way changed it"
        )
    return path


def cached_digest(path: Path) -> str | None:
    """Returns the sha256 that the cache knows a file of the Hub by, if it knows one."""
    # The cache links snapshots/COMMIT/NAME to blobs/ETAG; a large file's etag is its sha256.
    if not path.is_symlink():
        return None
    name = path.readlink().name
    return name if _SHA256.fullmatch(name) else None


def forget(path: Path) -> None:
    """Removes a file from the cache: the link of its snapshot and the data behind it."""
    blob = path.resolve()
    path.unlink(missing_ok=True)
    if blob.is_relative_to(_cache()):
        blob.unlink(missing_ok=True)


def check_name(kind: str, name: str) -> None:
    """Refuses a name that would lead out of the folder it is looked for in.

    Args:
        kind: What is named, for the error.
        name: A file's or a revision's name, ``/`` between folders.

    Raises:
        ValueError: If it is not a plain relative name.
    """
    plain = re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", name, re.ASCII)
    if not plain or not {"..", "."}.isdisjoint(name.split("/")):
        raise ValueError(f"a {kind}'s name must be relative, without '..'; got {name!r}; check it")


def _announcement(
    repo_id: str, filename: str, revision: str | None, token: str | bool | None
) -> tuple[int, str]:
    """Asks the server for a file's size and etag; a few tries, and few seconds."""
    import huggingface_hub as hub
    from huggingface_hub import constants

    url = hub.hf_hub_url(repo_id, filename, revision=revision)
    patience = float(constants.HF_HUB_ETAG_TIMEOUT)
    start = time.monotonic()
    for attempt in range(1, _TRIES + 1):
        try:
            found = hub.get_hf_file_metadata(url, token=token, timeout=patience)
            break
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", 500)
            final = status < 500 and status not in {408, 429}
            if final or attempt == _TRIES or time.monotonic() - start > patience / 2:
                raise
            time.sleep(0.5 * attempt)
    # These become file names in the cache: a lying server must not choose where it is written.
    for name in (found.etag, found.commit_hash):
        if name is None or not re.fullmatch(r"\w[\w-]{0,127}", name, re.ASCII):
            raise RuntimeError(f"etag and commit must be plain words; got {name!r}")
    if found.size is None:
        raise RuntimeError("the server does not say how large the file is")
    return found.size, str(found.etag)


def _transfer(
    repo_id: str,
    filename: str,
    revision: str | None,
    token: str | bool | None,
    size: int,
    refresh: bool,
) -> Path:
    import huggingface_hub as hub
    from huggingface_hub.utils.tqdm import tqdm

    class Bounded(tqdm):
        """Stops a transfer that starts over for ever, or never ends."""

        received = 0

        def update(self, n: float | None = 1) -> bool | None:
            self.received += max(int(n or 0), 0)  # starting over moves the bar back
            if self.received > _TRIES * size:
                raise RuntimeError(f"more than {_TRIES} times the announced {size} bytes came")
            return super().update(n)

    options: dict[str, Any] = {"revision": revision, "token": token, "force_download": refresh}
    if "tqdm_class" in signature(hub.hf_hub_download).parameters:  # huggingface_hub 1.1 and later
        options["tqdm_class"] = Bounded
    return Path(hub.hf_hub_download(repo_id, filename, **options))


def _inside_cache(path: Path) -> Path:
    if not path.resolve().is_relative_to(_cache()):
        raise RuntimeError(
            f"a cached file must lie in the Hugging Face cache {_cache()}; {path} leads to "
            f"{path.resolve()}; delete it"
        )
    return path


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).resolve()


def _unavailable(
    wanted: str, repo_id: str, filename: str, revision: str | None, reason: str
) -> RuntimeError:
    from huggingface_hub import hf_hub_url

    return RuntimeError(
        f"needed {wanted}; it is not in the Hugging Face cache {_cache()}, and {reason}. "
        "Do one of: run once with a connection (and HF_HUB_OFFLINE unset); copy that cache from "
        f"a machine that has the file; fetch {hf_hub_url(repo_id, filename, revision=revision)} "
        "by other means and give its path, on the command line by --model NAME=FILE"
    )


def _flat(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
