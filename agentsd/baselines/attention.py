"""Baselines that speed up self-attention: tomesd, ToDo and tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MissingPackageError, PatchError
from ..patching.layers import find_unet, replaced_processors, top_attention_layers


@contextmanager
def tomesd(x: Any, ratio: float = 0.5, **settings: Any) -> Iterator[Any]:
    """Token merging with its authors' package (Bolya & Hoffman, 2023, arXiv 2303.17604; tomesd).

    Args:
        x: A pipeline or UNet.
        ratio: Share of the tokens to merge, in (0, 0.75].
        **settings: Other arguments of ``tomesd.apply_patch``, such as ``max_downsample``.

    Yields:
        ``x``, changed until the end of the block. Random draws are the same each time and do not
        touch the global generator.

    Raises:
        MissingPackageError: If tomesd is not installed.
        PatchError: If ``ratio`` is out of range.
    """
    if not 0 < ratio <= 0.75:
        raise PatchError(f"tomesd: ratio must be in (0, 0.75] (got {ratio})")
    try:
        import tomesd
    except ImportError as error:
        raise MissingPackageError("tomesd", "this baseline", "benchmark") from error
    unet = find_unet(x)
    try:
        # tomesd copies the state of the device's global generator at its first use.
        with torch.random.fork_rng([unet.device] if unet.device.type == "cuda" else []):
            torch.manual_seed(0)
            tomesd.apply_patch(unet, ratio=ratio, **settings)
            yield x
    finally:
        tomesd.remove_patch(unet)
        for module in unet.modules():
            vars(module).pop("_tome_info", None)


def todo(x: Any, stride: int = 2) -> AbstractContextManager[Any]:
    """Keys and values of every ``stride``-th row and column (ToDo; Smith et al., 2024).

    Nearest-neighbour downsampling of the tokens that become keys and values (arXiv 2402.13573,
    section 3.2), at the highest resolution that has self-attention.

    Args:
        x: A pipeline or UNet.
        stride: 2 or more. Larger is faster and coarser.

    Returns:
        A context manager that yields ``x``, changed until the end of the block.

    Raises:
        PatchError: If ``stride`` is out of range or no layer can be changed.
    """

    def attend(attend: Callable[..., Tensor], x: Tensor, height: int, width: int) -> Tensor:
        grid = x.unflatten(1, (height, width))  # [B, h, w, C]
        return attend(x, grid[:, ::stride, ::stride].flatten(1, 2))

    if type(stride) is not int or stride < 2:
        raise PatchError(f"todo: stride must be a whole number above 1 (got {stride})")
    return _on_the_grid(x, attend)


def tiles(x: Any, side: int = 16) -> AbstractContextManager[Any]:
    """Attention within tiles (as in HyperTile), at the highest resolution that has self-attention.

    Args:
        x: A pipeline or UNet.
        side: Side of a tile in tokens, 2 or more. If it does not divide the grid, the next larger
            divisor is used.

    Returns:
        A context manager that yields ``x``, changed until the end of the block.

    Raises:
        PatchError: If ``side`` is out of range or no layer can be changed.
    """

    def attend(attend: Callable[..., Tensor], x: Tensor, height: int, width: int) -> Tensor:
        down, across = (max(n // side, 1) for n in (height, width))
        down = next(n for n in range(down, 0, -1) if height % n == 0)
        across = next(n for n in range(across, 0, -1) if width % n == 0)
        grid = x.unflatten(1, (down, height // down, across, width // across))
        cut = grid.transpose(2, 3).flatten(0, 2).flatten(1, 2)  # [B · tiles, tokens, C]
        parts = (-1, down, across, height // down, width // across)
        out = attend(cut).view(*parts, x.shape[-1])
        return out.transpose(2, 3).reshape(x.shape)

    if type(side) is not int or side < 2:
        raise PatchError(f"tiles: side must be a whole number above 1 (got {side})")
    return _on_the_grid(x, attend)


class _Processor:
    """Calls the original processor on tokens rearranged on their grid."""

    def __init__(self, original: Any, attend: Callable[..., Tensor], size: list[tuple[int, int]]):
        self.original, self.attend, self.size = original, attend, size

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        height, width = self.size[0]
        if hidden_states.shape[1] != height * width:
            out: Tensor = self.original(attn, hidden_states, *args, **kwargs)
            return out

        def attend(x: Tensor, keys: Tensor | None = None) -> Tensor:
            out: Tensor = self.original(attn, x, keys)
            return out

        return self.attend(attend, hidden_states, height, width)


@contextmanager
def _on_the_grid(x: Any, attend: Callable[..., Tensor]) -> Iterator[Any]:
    unet = find_unet(x)
    layers = top_attention_layers(unet)
    if not layers:
        raise PatchError("this UNet has no self-attention layer that can be changed")
    top = layers[0].downsample
    size = [(0, 0)]  # size of the grid, set before each call of the UNet

    def set_size(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sample = args[0] if args else kwargs["sample"]
        size[0] = (-(-sample.shape[2] // top), -(-sample.shape[3] // top))

    hook = unet.register_forward_pre_hook(set_size, with_kwargs=True)
    try:
        with replaced_processors(layers, lambda original: _Processor(original, attend, size)):
            yield x
    finally:
        hook.remove()
