"""Finds a network of timm, and builds it with timm's weights or the user's."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from contextlib import redirect_stdout
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featup_hub.registry import ModelCard
from featup_hub.weights.checkpoints import read_state
from featup_hub.weights.files import listed_problems
from featup_hub.weights.hub import explained

_AS_GIVEN = {"source": "", "custom_load": False}  # timm then loads the state_dict beside it
_HUB = ("hf-hub:", "hf_hub:")  # timm's prefix of Hub repositories


def create(
    name: str,
    *,
    pretrained: bool = False,
    weights: Mapping[str, Tensor] | str | Path | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Builds a network of timm and loads weights strictly, if any.

    timm loads the weights, so its conversions apply: it resamples position embeddings and reads the
    authors' files. The arguments are those of :class:`TimmBackbone`.
    """
    config = find_config(name)
    kwargs = dict(backbone_kwargs or {})
    if weights is None:
        if not pretrained:
            return build(name, {**kwargs, "pretrained": False})
        if not config.has_weights:
            raise RuntimeError(
                f"timm has no weights for {name!r}; give a file of your own, or pretrained=False"
            )
        if cached := _cached(config):
            try:  # to read it here, because timm before 1.0.26 runs code in pickles
                tensors = read_state(cached)
            except ValueError as error:
                raise RuntimeError(
                    f"needed the weights of timm's {name}; {error}; delete the file to download it "
                    "again"
                ) from None
            kwargs["pretrained_cfg_overlay"] = {"state_dict": tensors, **_AS_GIVEN}
        with explained(f"the weights of timm's {name}"):
            model = build(name, {**kwargs, "pretrained": True})
        model.pretrained_cfg.pop("state_dict", None)  # else it stays in memory with the model
        return model
    tensors = dict(weights) if isinstance(weights, Mapping) else read_state(weights)
    if not tensors:  # timm would download its own
        raise ValueError("weights must be tensors by name; got an empty mapping; leave weights out")
    for key, tensor in tensors.items():
        if getattr(tensor, "dtype", None) in (torch.int8, torch.uint8):
            raise ValueError(
                f"weights must be floating-point; got {key} of {tensor.dtype}, perhaps quantised; "
                "give the original ones"
            )
    overlay = {"state_dict": tensors, **_AS_GIVEN, "label_offset": 0}
    classes = _classes(tensors, config.classifier)
    # A file without a known classifier is for a network without one, or timm makes one.
    attempts = [classes] if classes is not None else [0, config.num_classes]
    problems = []
    for num_classes in attempts:
        kwargs["pretrained_cfg_overlay"] = {**overlay, "num_classes": num_classes}
        try:
            model = build(name, {**kwargs, "pretrained": True})
        except (RuntimeError, KeyError) as error:
            problems.append(error)
        else:
            model.pretrained_cfg.pop("state_dict", None)
            _check_biases(name, model, tensors)
            return model
    raise ValueError(
        f"these weights are not those of timm's {name}: {_problems(problems[-1])}; "
        "check that file and network belong together"
    ) from problems[-1]


def cached_file(name: str) -> str | None:
    """Returns timm's weights of a name if they are in the Hub's cache; sends no request."""
    return _cached(find_config(name))


def _cached(config: Any) -> str | None:
    import huggingface_hub as hub

    if config.source == "hf-hub" or not config.hf_hub_id:
        return None
    file = config.hf_hub_filename or "model.safetensors"
    found = hub.try_to_load_from_cache(config.hf_hub_id, file)
    return found if isinstance(found, str) else None


def build(name: str, kwargs: Mapping[str, Any]) -> Any:
    """Calls timm, with position embeddings that adapt to the image's size if possible."""
    import timm

    with redirect_stdout(io.StringIO()):  # timm prints when it converts DINOv3's names
        try:
            return timm.create_model(name, **{"dynamic_img_size": True, **kwargs})
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
        return timm.create_model(name, **kwargs)


def _classes(tensors: Mapping[str, Tensor], classifier: str | tuple[str, ...] | None) -> int | None:
    """Counts the classes of a file; None if it has no classifier of a usual name."""
    named = (classifier,) if isinstance(classifier, str) else (classifier or ())
    for layer in (*named, "head", "head.fc", "fc", "classifier"):
        if f"{layer}.weight" in tensors:
            return len(tensors[f"{layer}.weight"])
    return None


def _check_biases(name: str, model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Refuses a DINOv3 file with biases that timm would drop silently."""
    names = [n for n in tensors if n.endswith("attn.qkv.bias") and "storage_tokens" in tensors]
    if not names or any(parameter.endswith("q_bias") for parameter, _ in model.named_parameters()):
        return
    for query, _, value in (tensors[n].chunk(3) for n in names):
        if query.any() or value.any():
            raise ValueError(
                f"this DINOv3 file has biases of queries and values, which timm's {name} lacks; "
                f"take {name.split('.')[0]}_qkvb"
            )


def is_timm_model(name: str) -> bool:
    """Returns whether timm has this name, with or without a tag of weights."""
    import timm

    return name.startswith(_HUB) or timm.is_model(name.split(".")[0])


def _problems(error: Exception) -> str:
    """Summarises PyTorch's error, without its lists of hundreds of names."""
    text = str(error)
    # Parses the text, because only timm knows the names and shapes after its conversions.
    missing, unknown = (
        re.findall(r'"([^"]+)"', "".join(re.findall(rf"{which} key\(s\).*", text)))
        for which in ("Missing", "Unexpected")
    )
    shapes = r"size mismatch for (\S+): .*?Size\(\[(.*?)\]\).*?Size\(\[(.*?)\]\)"
    differing = [f"{key} ({got}), needed ({due})" for key, got, due in re.findall(shapes, text)]
    problems = {"missing": missing, "not known here": unknown, "of another shape": differing}
    return listed_problems(problems) or text


def find_config(name: str) -> Any:
    """Returns timm's config of a name; refuses unknown names."""
    import timm
    from timm.models import PretrainedCfg, load_model_config_from_hf

    if not isinstance(name, str):
        raise TypeError(f"a timm network is named by a string; got {type(name).__name__}")
    if name.startswith(_HUB):
        place = name.partition(":")[2]
        with explained(f"config.json of {place}"):
            return PretrainedCfg(**load_model_config_from_hf(place)[0])
    architecture = name.split(".")[0]
    if not is_timm_model(name):
        near = get_close_matches(architecture.lower(), timm.list_models(), n=3)
        raise ValueError(
            f"timm {timm.__version__} has no model {name!r}; "
            + (f"did you mean {' or '.join(near)}? " if near else "")
            + "newer versions may have it: pip install --upgrade timm"
        )
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError:
        tagged = ", ".join(timm.list_pretrained(f"{architecture}.*"))
        raise ValueError(
            f"timm {timm.__version__} has no weights {name!r}; it has {tagged or 'none'}"
        ) from None


def timm_card(name: str) -> ModelCard:
    """Makes a card for any network of timm, from timm's config; raises as :func:`find_config`."""
    config = find_config(name)
    return ModelCard(
        f"timm/{name}",
        name,
        None,
        None,
        image_size=config.input_size[-1],
        licence=config.license or "not stated by timm",
        data="see its page on the Hugging Face Hub",
    )
