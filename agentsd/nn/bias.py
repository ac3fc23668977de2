"""The position biases of agent attention (arXiv 2312.08874, section 4.2)."""

from __future__ import annotations

from math import isqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError

Grid = tuple[int, int]
"""Height and width of an image in tokens."""

STD = 0.02
"""Standard deviation of the initial biases and projections."""

_COARSE = 7  # side of the map that is enlarged to the grid
_AGENTS_LAST = {"ha_bias", "wa_bias", "ca_bias"}


class AgentBias(nn.Module):
    """The terms that agent attention adds to the logits of its two softmaxes.

    Each bias is the sum of a coarse map, upsampled bilinearly, a term per row and a term per
    column, so that ``n`` agents on a grid of ``h × w`` tokens need ``2·H·n·(49 + h + w)``
    parameters instead of ``2·H·n·h·w``::

        B₁ = bilinear(an_bias) + ah_bias + aw_bias       [1, H, n, N]
        B₂ = bilinear(na_bias) + ha_bias + wa_bias       [1, H, N, n]

    On another grid, the terms of rows and columns are also resized bilinearly. A class token, which
    comes first, has the terms ``ac_bias`` and ``ca_bias``.

    Args:
        heads: Number of heads ``H``.
        agents: Number of agents ``n``, a square number: they are laid out as √n × √n.
        grid: Height and width of the image in tokens.
        class_token: Whether a class token comes before the grid's tokens.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ModelError: If ``agents`` is not a square number.

    Example:
        >>> gather, broadcast = AgentBias(heads=3, agents=49, grid=(14, 14))()
        >>> gather.shape, broadcast.shape
        (torch.Size([1, 3, 49, 196]), torch.Size([1, 3, 196, 49]))
    """

    def __init__(
        self,
        heads: int,
        agents: int,
        grid: Grid,
        class_token: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        side_of(agents)
        self.grid = grid
        self.class_token = class_token

        def table(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

        h, w = grid
        self.an_bias = table(heads, agents, _COARSE, _COARSE)
        self.na_bias = table(heads, agents, _COARSE, _COARSE)
        self.ah_bias = table(1, heads, agents, h, 1)
        self.aw_bias = table(1, heads, agents, 1, w)
        self.ha_bias = table(1, heads, h, 1, agents)
        self.wa_bias = table(1, heads, 1, w, agents)
        if class_token:
            self.ac_bias = table(1, heads, agents, 1)
            self.ca_bias = table(1, heads, 1, agents)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise all biases."""
        for bias in self.parameters(recurse=False):
            nn.init.trunc_normal_(bias, std=STD)

    @torch.no_grad()
    def set_grid(self, grid: Grid) -> None:
        """Change the grid; parameters of rows and columns are resized to it."""
        if grid == self.grid:
            return
        self.grid, (h, w) = grid, grid
        heads, agents = self.an_bias.shape[:2]
        for name, shape in {
            "ah_bias": (1, heads, agents, h, 1),
            "aw_bias": (1, heads, agents, 1, w),
            "ha_bias": (1, heads, h, 1, agents),
            "wa_bias": (1, heads, 1, w, agents),
        }.items():
            setattr(self, name, nn.Parameter(resize_bias(name, getattr(self, name), shape)))

    def forward(self, grid: Grid | None = None) -> tuple[Tensor, Tensor]:
        """Both biases for a grid, by default its own.

        Returns:
            ``[1, H, n, N]`` and ``[1, H, N, n]``; ``N`` counts the class token, if there is one.
        """
        h, w = grid or self.grid
        to_agents = self._map("an_bias", h, w) + self._map("ah_bias", h, 1)
        to_agents = (to_agents + self._map("aw_bias", 1, w)).flatten(2)  # [H, n, h·w]
        from_agents = self._map("na_bias", h, w) + self._map("ha_bias", h, 1)
        from_agents = (from_agents + self._map("wa_bias", 1, w)).flatten(2).mT  # [H, h·w, n]
        if self.class_token:
            to_agents = torch.cat([self.ac_bias[0], to_agents], dim=2)
            from_agents = torch.cat([self.ca_bias[0], from_agents], dim=1)
        return to_agents[None], from_agents[None]

    def _map(self, name: str, height: int, width: int) -> Tensor:
        return resize(_as_maps(name, getattr(self, name)), (height, width))

    def extra_repr(self) -> str:
        """The sizes, for ``print``."""
        heads, agents = self.an_bias.shape[:2]
        return f"heads={heads}, agents={agents}, grid={self.grid}"


def side_of(agents: int) -> int:
    """The square root of the number of agents: agents per row and per column."""
    if agents < 1 or isqrt(agents) ** 2 != agents:
        raise ModelError(f"agents: must be a square number such as 9, 16 or 49 (got {agents})")
    return isqrt(agents)


def resize_bias(name: str, table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Resize one of the biases bilinearly, first over the image and then over the agents.

    Args:
        name: Such as ``"an_bias"``, which says where its axes are.
        table: The bias.
        shape: Of the bias for another grid, another number of agents, or both.

    Returns:
        The bias in ``shape``.
    """
    maps = _as_maps(name, table)  # [H, n, a, b]
    agents, height, width = _as_maps(name, table.new_empty(shape, device="meta")).shape[1:]
    maps = resize(maps, (height, width))
    if agents != maps.shape[1]:
        side = side_of(maps.shape[1])
        per_place = maps.flatten(2).mT.unflatten(2, (side, side))  # [H, places, √n, √n]
        per_place = resize(per_place, (side_of(agents), side_of(agents)))
        maps = per_place.flatten(2).mT.unflatten(2, (height, width))
    if name in _AGENTS_LAST:
        maps = maps.movedim(1, -1)
    return maps.reshape(shape)


def _as_maps(name: str, table: Tensor) -> Tensor:
    """Any bias as ``[H, n, rows, columns]``."""
    if name in ("an_bias", "na_bias"):
        return table
    table = table[0]
    if name in _AGENTS_LAST:
        table = table.movedim(-1, 1)
    return table if table.dim() == 4 else table[..., None]


def resize(maps: Tensor, size: Grid) -> Tensor:
    """Resize ``[·, ·, rows, columns]`` bilinearly."""
    if tuple(maps.shape[-2:]) == size:
        return maps
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)
