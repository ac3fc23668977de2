"""Put a scheduler, adapters and other options on a pipeline, with diffusers' own methods."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import diffusers
import torch
from diffusers import ControlNetModel, DiffusionPipeline

from ..errors import AgentSDError, LoadError, SettingsError
from ..patching.diffusers_internals import DTYPE
from ..settings import short_repr
from .loading import only_variant
from .options import Lora, PipelineOptions
from .quiet import quiet_loading
from .schedulers import scheduler_for

Offload = Literal["model", "sequential", "group"]


@quiet_loading()
def configure_pipeline(
    pipe: DiffusionPipeline,
    options: PipelineOptions,
    *,
    offload: Offload | None = None,
    allow_pickle: bool = False,
) -> DiffusionPipeline:
    """Put options on a pipeline.

    Args:
        pipe: A text-to-image pipeline on its device.
        options: What to add; :meth:`PipelineOptions.check_files` checks its files beforehand.
        offload: Keep what is not in use on the CPU: whole models (a little slower), or layers
            (``sequential`` and ``group``, much slower, least memory).
        allow_pickle: Also load weights that are not safetensors, which can execute arbitrary code.

    Returns:
        The pipeline, or another that shares its models, for image to image or a ControlNet.

    Raises:
        SettingsError: If there is no such scheduler or backend.
        LoadError: If weights cannot be loaded or do not fit the model.
    """
    device = pipe.device
    if options.scheduler is not None:
        pipe.scheduler = scheduler_for(pipe, options.scheduler)
    if options.controlnet is not None:
        pipe = _with_controlnet(pipe, options.controlnet, allow_pickle)
    if options.init_image is not None:
        with _load_errors("image to image"):
            pipe = diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    _load_loras(pipe, options.parsed_loras(), allow_pickle)
    if options.ip_adapter is not None:
        _load_ip_adapter(pipe, options.ip_adapter, allow_pickle)
    if options.vae_tiling:
        pipe.vae.enable_tiling()
    if options.vae_slicing:
        pipe.vae.enable_slicing()
    if options.attention_backend is not None:
        try:
            pipe.unet.set_attention_backend(options.attention_backend)
        except (ValueError, RuntimeError, ImportError) as error:
            raise SettingsError(f"attention_backend: {error}") from error
    if offload is not None:
        _offload(pipe, offload, device)
    if options.compile:
        pipe.unet.compile()
    return pipe


def _with_controlnet(pipe: DiffusionPipeline, source: str, allow_pickle: bool) -> DiffusionPipeline:
    with _load_errors("the ControlNet", source):
        net = ControlNetModel.from_pretrained(
            source,
            use_safetensors=not allow_pickle or None,
            variant=only_variant(Path(source)),
            **{DTYPE: pipe.dtype},
        )
        return diffusers.AutoPipelineForText2Image.from_pipe(pipe, controlnet=net.to(pipe.device))


def _load_loras(pipe: DiffusionPipeline, loras: Sequence[Lora], allow_pickle: bool) -> None:
    names = [f"lora_{i}" for i in range(len(loras))]
    for name, lora in zip(names, loras, strict=True):
        with _load_errors("the LoRA", lora.path, needs="peft"):
            safe = {} if allow_pickle else {"use_safetensors": True}
            pipe.load_lora_weights(lora.path, adapter_name=name, **safe)
    if names:
        pipe.set_adapters(names, [lora.scale for lora in loras])


def _load_ip_adapter(pipe: DiffusionPipeline, source: str, allow_pickle: bool) -> None:
    file = Path(source)
    if file.suffix != ".safetensors" and not allow_pickle:
        raise LoadError(f"{source} is not a .safetensors file; --allow-pickle loads it anyway")
    parts = source.split("/")
    folder, subfolder = (
        (str(file.parent), "") if file.is_file() else ("/".join(parts[:2]), "/".join(parts[2:-1]))
    )
    with _load_errors("the IP-Adapter", source):
        pipe.load_ip_adapter(folder, subfolder=subfolder, weight_name=file.name)


def _offload(pipe: DiffusionPipeline, mode: Offload, device: torch.device) -> None:
    if device.type == "cpu":
        raise SettingsError("cpu_offload: the model is on the CPU already; it needs another device")
    if mode == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif mode == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    else:
        pipe.enable_group_offload(onload_device=device, offload_type="leaf_level")


@contextmanager
def _load_errors(what: str, source: str | None = None, needs: str | None = None) -> Iterator[None]:
    """Raise whatever diffusers and the hub raise as a :class:`LoadError`."""
    try:
        yield
    except AgentSDError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        hint = ""
        if source is not None:
            what = f"{what} {short_repr(source)}"
            if not os.path.exists(source):
                hint = "; it is not a local folder or file, and the hub did not provide it"
        if needs is not None and needs.upper() in reason:
            hint = f"; pip install {needs}"
        raise LoadError(f"{what} cannot be loaded ({short_repr(reason)}){hint}") from error
