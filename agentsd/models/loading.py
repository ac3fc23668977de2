"""Load a pipeline: the built-in pocket model, a folder, a hub id or a single file."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from huggingface_hub.utils import RepositoryNotFoundError  # type: ignore[attr-defined]
from safetensors import SafetensorError, safe_open

from ..errors import LoadError
from ..patching.diffusers_internals import DTYPE
from ..settings import short_repr
from .fingerprints import fingerprint
from .quiet import quiet_loading

POCKET = Path(__file__).resolve().parents[1] / "pocket"
"""Folder of the built-in model."""

POCKET_GUIDANCE = 2.0
"""Guidance scale that suits the built-in model best; see its model card."""


def model_fingerprint(model: str, revision: str | None = None) -> str | None:
    """The fingerprint of what :func:`load_pipeline` loads; files are hashed the first time."""
    return fingerprint(POCKET if model == "pocket" else model, revision)


def default_guidance(model: str) -> float:
    """The default guidance scale of a model."""
    return POCKET_GUIDANCE if model == "pocket" else 7.5


HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
"""What the id of a model on the hub looks like."""

FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@quiet_loading()
def load_pipeline(
    model: str | Path = "pocket",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> DiffusionPipeline:
    """Load a diffusers pipeline, ready to run and to patch.

    Args:
        model: ``"pocket"`` (the small model that comes with agentsd), a folder in diffusers
            format, a ``.safetensors`` file with a whole Stable Diffusion checkpoint, or a model
            id on the Hugging Face hub.
        device: Where to run; by default CUDA if available, else MPS, else the CPU.
        dtype: ``"float32"``, ``"float16"``, ``"bfloat16"`` or a ``torch.dtype``; by default
            float32 on the CPU and float16 elsewhere.
        allow_pickle: Also load weights in pickle format (``.ckpt``, ``.bin``), which are refused
            otherwise, since they can execute arbitrary code.
        **kwargs: Passed on to diffusers' ``from_pretrained`` or ``from_single_file``
            (``revision``; ``variant``, detected in a folder that has only one; ``config``, a
            folder with the configuration of a single file, which else comes from the hub).

    Returns:
        The pipeline on its device.

    Raises:
        LoadError: If there is no such model, device or dtype, or the model cannot be read.

    Example:
        >>> from agentsd import load_pipeline
        >>> pipe = load_pipeline("pocket")
        >>> type(pipe).__name__
        'StableDiffusionPipeline'
    """
    target = target_device(device)
    kwargs[DTYPE] = target_dtype(dtype, target)
    path = POCKET if model == "pocket" else Path(model)
    name = f"the model {short_repr(str(model))}"
    hint = ""
    if os.path.exists(path) and kwargs.get("revision") is not None:
        raise LoadError(f"{name} is local, and only the hub has revisions; drop revision")
    if os.path.isfile(path) and kwargs.get("variant") is not None:
        raise LoadError(f"{name} is a single file, which has no variants; drop variant")
    if os.path.isdir(path) and kwargs.get("variant") is None:
        kwargs["variant"] = only_variant(path, allow_pickle=allow_pickle)
        if kwargs["variant"] is None and (parts := _variants(path, allow_pickle)):
            there = ", ".join(sorted(set().union(*parts)))
            raise LoadError(f"{name} only has weights of variants ({there}); choose one (variant)")
    # None prefers safetensors, and takes pickles where there are none.
    safe = {"use_safetensors": None if allow_pickle else True}
    try:
        if os.path.isfile(path):
            hint = "; a single file also needs its configuration: the hub's, or a folder as config="
            pipe = _single_file_class(path, allow_pickle).from_single_file(str(path), **kwargs)
        elif os.path.isdir(path):
            if not (path / "model_index.json").is_file():
                raise LoadError(f"{name} has no model_index.json; it is not in diffusers' format")
            if not allow_pickle and _only_pickles(path):
                hint = (
                    "; weights must be .safetensors files: pickles can execute arbitrary code and "
                    "are refused (--allow-pickle allows them)"
                )
            pipe = DiffusionPipeline.from_pretrained(path, **safe, **kwargs)
        elif path.suffix in FILES or not HUB_ID.fullmatch(str(model)):
            raise LoadError(f"{name} is neither a local folder or file nor 'pocket'")
        else:
            if kwargs.get("variant") is None:
                hint = "; if it only has weights of a variant, name it (variant)"
            pipe = DiffusionPipeline.from_pretrained(str(model), **safe, **kwargs)
    except LoadError:
        raise
    except Exception as error:  # diffusers, transformers and the hub raise kinds of their own
        if not os.path.exists(path) and (missing := missing_from_hub(error)):
            raise LoadError(f"{name} is neither a local folder or file {missing}") from error
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise LoadError(f"{name}: cannot be loaded ({short_repr(reason)}){hint}") from error
    return pipe.to(target)


def missing_from_hub(error: BaseException | None) -> str | None:
    """Why the hub gave no model: it has none of that name, or it cannot be reached.

    Args:
        error: What loading a model from the hub raised.
    """
    while error is not None:
        if isinstance(error, RepositoryNotFoundError):
            return "nor the id of a model on the hub; check the name"
        if isinstance(error, (ConnectionError, TimeoutError, socket.gaierror)):
            return "nor a model in the hub's cache, and the hub cannot be reached"
        error = error.__cause__ or error.__context__
    return None


def only_variant(folder: Path, *, allow_pickle: bool = False) -> str | None:
    """The only variant (such as ``fp16``) of a folder in which a part has no other weights.

    Weights of a variant are named ``model.fp16.safetensors`` or, in several files,
    ``model.fp16-00001-of-00002.safetensors``.

    Args:
        folder: Of a pipeline, with a subfolder for each part, or of a single model.
        allow_pickle: Whether ``.bin`` files count, too.

    Returns:
        The variant, or None if every part has weights without one, or there are several to choose
        from.
    """
    parts = _variants(folder, allow_pickle)
    common = set.intersection(*parts) if parts else set()
    return common.pop() if len(common) == 1 else None


def _variants(folder: Path, allow_pickle: bool) -> list[set[str]]:
    """The variants of each part whose weights all belong to one."""
    parts = []
    for part in _parts(folder):
        kinds = (".safetensors", ".bin") if allow_pickle else (".safetensors",)
        names = [file.stem for file in part.iterdir() if file.suffix in kinds]
        found = {SHARD.sub("", name.partition(".")[2]) for name in names}
        if found and "" not in found:
            parts.append(found)
    return parts


SHARD = re.compile(r"-\d+-of-\d+$")
"""Ending of the names of weights that are split into several files."""


def _only_pickles(folder: Path) -> bool:
    """Whether a part has weights, but none as safetensors."""
    kinds = [{file.suffix for file in part.iterdir()} for part in _parts(folder)]
    return any(".bin" in found and ".safetensors" not in found for found in kinds)


def _parts(folder: Path) -> list[Path]:
    is_model = (folder / "config.json").is_file()
    return [folder] if is_model else [part for part in folder.iterdir() if part.is_dir()]


def _single_file_class(path: Path, allow_pickle: bool) -> type[DiffusionPipeline]:
    if path.suffix != ".safetensors":
        if allow_pickle:
            return diffusers.StableDiffusionPipeline  # type: ignore[no-any-return]
        raise LoadError(
            f"{path} is not a .safetensors file; pickled checkpoints (.ckpt, .pt, .bin) can "
            "execute arbitrary code and are refused: convert it, or give --allow-pickle"
        )
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path} is not a complete safetensors file ({error})") from None
    if not any(name.startswith("model.diffusion_model.") for name in names):
        raise LoadError(
            f"{path} is not a full Stable Diffusion checkpoint (no model.diffusion_model.*); LoRAs "
            "and other parts are added to a pipeline, such as with --lora"
        )
    if any(name.startswith("conditioner.") for name in names):
        return diffusers.StableDiffusionXLPipeline  # type: ignore[no-any-return]
    return diffusers.StableDiffusionPipeline  # type: ignore[no-any-return]


def target_device(device: str | torch.device | None) -> torch.device:
    """The device of a name; by default CUDA, else MPS, else the CPU.

    Raises:
        LoadError: If it is not available.
    """
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise LoadError(f"no device {short_repr(device)}: use cpu, cuda or mps") from None
    try:
        torch.ones(1, device=found).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        first = short_repr(str(error).strip().splitlines()[0])
        raise LoadError(f"no device {str(device)!r} here ({first}); 'cpu' always works") from None
    return found


def target_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for, or the device's default; LoadError for any but :data:`DTYPES`."""
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    found = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise LoadError(f"dtype must be one of {', '.join(DTYPES)} (got {dtype!r})")
    assert isinstance(found, torch.dtype)
    return found
