"""Saving a module to a folder or a Hugging Face Hub repository, and loading it again.

The layout is that of ``huggingface_hub.PyTorchModelHubMixin``: ``config.json`` with the
constructor's arguments, ``model.safetensors``, and ``README.md``, the model card. The mixin itself
is not used: it would make the Hub's library a requirement of every upsampler.
"""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from featup_hub.files import write_atomically
from featup_hub.weights import load_into, read, write
from featup_hub.weights.hub import download

if TYPE_CHECKING:
    from typing_extensions import Self

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_CARD = """---
library_name: featup_hub
pipeline_tag: image-feature-extraction
{licence}tags:
- feature-upsampling
---

# {name}

This is an upsampler of featup_hub, `{name}`, with {parameters:,} parameters. It upsamples the
features of a vision backbone to the resolution of the image.

```python
from featup_hub import {name}

upsampler = {name}.from_pretrained("{repo_id}")
features = upsampler(source, image)  # (B, C, h, w), (B, 3, H, W) -> (B, C, H, W)
```

Training data, scores and limits: to be written by its authors.
"""


class Pretrained(nn.Module):
    """A module that can be saved, shared and loaded again.

    Its constructor takes only numbers or None, and keeps each as an attribute of the same name.
    """

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
    ) -> Self:
        """Loads a module, in eval mode.

        Args:
            source: Folder made by :meth:`save_pretrained`, or Hub repository, ``owner/name``.
            revision: Commit, tag or branch of the repository; default: the main branch.
            token: Access token; default: the one the Hub's library finds.
            force_download: Download the files even if they are cached.

        Raises:
            ValueError: If a file is damaged, or weights and config do not match.
            FileNotFoundError: If the folder lacks a file.
            RuntimeError: If the repository's files are not cached and cannot be downloaded.
        """
        if (folder := Path(source).expanduser()).is_dir():
            config, weights = folder / CONFIG, folder / WEIGHTS
            if not config.is_file():
                raise FileNotFoundError(
                    f"needed {CONFIG} and {WEIGHTS} in {folder}; got no {CONFIG}; "
                    "make the folder with save_pretrained"
                )
        else:
            options: dict[str, Any] = {"token": token, "force_download": force_download}
            config = download(str(source), CONFIG, revision=revision, **options)
            # The cache keeps a snapshot per commit: both files must come from one.
            commit = config.parent.name
            weights = download(str(source), WEIGHTS, revision=commit, **options)
        try:
            with torch.device("meta"):
                module = cls(**json.loads(config.read_text(encoding="utf-8")))
        except (TypeError, ValueError, RuntimeError) as error:
            known = ", ".join(signature(cls).parameters)
            raise ValueError(
                f"{config} must be a JSON object with arguments of {cls.__name__} ({known}); "
                f"{error}; is it another model's?"
            ) from None
        load_into(module, read(weights), origin=weights)
        return module.eval()

    def save_pretrained(self, folder: str | Path, *, licence: str | None = None) -> None:
        """Writes config, weights and, unless there is one, a model card.

        ``licence`` is the name of the weights' licence for the card, as the Hub spells it.
        """
        folder = Path(folder).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        write(self.state_dict(), folder / WEIGHTS)
        config = {name: getattr(self, name) for name in signature(type(self)).parameters}
        if config.get("looks_per_side") == 1:
            del config["looks_per_side"]  # as in files from before it was kept
        _write_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        if not (folder / CARD).exists():
            _write_text(folder / CARD, self._card("OWNER/NAME", licence))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        branch: str | None = None,
        message: str | None = None,
        licence: str | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Uploads the module to a Hub repository; makes it if needed, keeps an existing card.

        Args:
            repo_id: Repository, ``owner/name``.
            private: Make a new repository private.
            branch: Branch to commit to; default: the main branch.
            message: Commit message.
            licence: As in :meth:`save_pretrained`.
            token: Access token; default: the one the Hub's library finds.

        Returns:
            The commit's address.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        with TemporaryDirectory() as folder:
            _write_text(Path(folder, CARD), self._card(repo_id, licence))
            self.save_pretrained(folder)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                revision=branch,
                commit_message=message or f"Upload {type(self).__name__}",
                ignore_patterns=[CARD] if api.file_exists(repo_id, CARD, revision=branch) else None,
            )
        return str(commit.commit_url)

    def _card(self, repo_id: str, licence: str | None) -> str:
        return _CARD.format(
            name=type(self).__name__,
            repo_id=repo_id,
            licence=f"license: {licence}\n" if licence else "",
            parameters=sum(p.numel() for p in self.parameters()),
        )


def _write_text(path: Path, text: str) -> None:
    with write_atomically(path) as partial:
        partial.write_text(text, encoding="utf-8")
