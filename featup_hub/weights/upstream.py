"""Reads checkpoints of FeatUp's own training code as plain tensors; their code is never run.

They are PyTorch pickles, of Lightning or only the state, with prefixes for the parts of the
training module. The parts are listed below; any other name is an error.

Source: names as in mhamilton723/FeatUp @ 6b5a6c0 (MIT).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from featup_hub.files import sha256_of_file
from featup_hub.weights.checkpoints import read_state
from featup_hub.weights.files import differences, write

FORMAT = "1"  # format of converted files: the upsampler's tensors, and the norm's under "norm."
_UPSAMPLER = "upsampler."
_EXTRAS = ("downsampler.", "scale_net.")
_NORM = {"model.1.norm.weight": "weight", "model.1.norm.bias": "bias"}
_STAGE: dict[str, tuple[int, ...]] = {
    "range_temp": (),
    "sigma_spatial": (),
    "range_proj.0.weight": (32, 3, 1, 1),
    "range_proj.0.bias": (32,),
    "range_proj.3.weight": (32, 32, 1, 1),
    "range_proj.3.bias": (32,),
    "fixup_proj.0.weight": (49, 52, 1, 1),
    "fixup_proj.0.bias": (49,),
    "fixup_proj.3.weight": (49, 49, 1, 1),
    "fixup_proj.3.bias": (49,),
}


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint:
    """Content of a checkpoint of upstream.

    Attributes:
        feat_dim: Channels of the features it was trained for.
        upsampler: Tensors of ``JBUStack(feat_dim)``.
        norm: Weight and bias of the channel norm behind its backbone, if it had one.
    """

    feat_dim: int
    upsampler: dict[str, Tensor]
    norm: dict[str, Tensor] | None


def convert_upstream(path: str | Path) -> ConvertedCheckpoint:
    """Reads a checkpoint of upstream, a ``.ckpt`` file, without running code from it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a PyTorch file, needs to run code, or has unknown names, missing
            names or wrong shapes.
    """
    state = {n: tensor for n, tensor in read_state(path).items() if not n.startswith(_EXTRAS)}
    closing = state.get(f"{_UPSAMPLER}fixup_proj.1.bias")
    feat_dim = 0 if closing is None else closing.numel()
    shapes = {
        **{
            f"{_UPSAMPLER}up{i}.{name}": shape
            for i in range(1, 5)
            for name, shape in _STAGE.items()
        },
        f"{_UPSAMPLER}fixup_proj.1.weight": (feat_dim, feat_dim, 1, 1),
        f"{_UPSAMPLER}fixup_proj.1.bias": (feat_dim,),
    }
    if not state.keys().isdisjoint(_NORM):
        shapes |= dict.fromkeys(_NORM, (feat_dim,))
    if problems := differences(state, {name: str(shape) for name, shape in shapes.items()}):
        if "up1.range_temp" in state:
            raise ValueError(
                f"{path} must be a checkpoint of FeatUp's JBU upsampler; got an upsampler of this "
                "package, which needs no conversion; give it to load_upsampler or --upsampler, as "
                "safetensors: safetensors.torch.save_file(upsampler.state_dict(), FILE)"
            )
        raise ValueError(
            f"{path} must be a checkpoint of FeatUp's JBU upsampler; {problems}; "
            "nothing was loaded; check that it is one, and whole"
        )
    return ConvertedCheckpoint(
        feat_dim=feat_dim,
        upsampler={n.removeprefix(_UPSAMPLER): t for n, t in state.items() if n not in _NORM},
        norm={_NORM[name]: state[name] for name in _NORM if name in state} or None,
    )


def convert(source: str | Path, target: str | Path) -> ConvertedCheckpoint:
    """Converts a checkpoint of upstream to a safetensors file.

    The file has the upsampler and, under ``norm.``, the channel norm. Tensors that only training
    needs are left out. The metadata are the format, ``feat_dim``, and the source with its digest.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a checkpoint.
        OSError: If the target cannot be written.
    """
    source = Path(source).expanduser()
    checkpoint = convert_upstream(source)
    norm = {f"norm.{name}": tensor for name, tensor in (checkpoint.norm or {}).items()}
    notes = {
        "format_version": FORMAT,
        "feat_dim": str(checkpoint.feat_dim),
        "source": source.name,
        "source_sha256": sha256_of_file(source),
    }
    write({**checkpoint.upsampler, **norm}, target, metadata=notes)
    return checkpoint
