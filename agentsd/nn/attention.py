"""Agent attention as a trainable layer (Han et al., ECCV 2024, arXiv 2312.08874)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..methods.agent_attention import agent_attention, softmax_attention
from .bias import STD, AgentBias, Grid, side_of


class AgentAttention(nn.Module):
    """Self-attention over an image's tokens through a few agents that are pooled from the queries.

    For width ``C``, ``H`` heads of width ``d = C / H``, ``n`` agents and ``N`` tokens, the cost is
    ``O(N·n·C)`` besides that of the projections (section 4 of the paper)::

        Q, K, V = x W_qkv                                     [N, C] each
        A   = pool(Q)                                         [n, C], before heads are split
        V_A = softmax(A Kᵀ · d^-0.5 + B₁) V                   [H, n, d]
        O   = softmax(Q Aᵀ · d^-0.5 + B₂) V_A                 [H, N, d]
        out = (O + DWC(V)) W_proj                             [N, C]

    Pooling is adaptive average pooling to √n × √n over the image. B₁ and B₂ are an
    :class:`AgentBias`. DWC is a 3 × 3 depthwise convolution over the image, which restores the
    feature diversity that a low-rank attention map loses. A class token comes first: it is a query
    and a key like any other, but is neither pooled nor convolved.

    Args:
        dim: Width ``C``, divisible by ``num_heads``.
        num_heads: Number of heads ``H``.
        grid: Height and width of the image in tokens. A call may use another grid.
        agents: Number of agents ``n``, a square number. More are slower and finer.
        class_token: Whether a class token comes before the grid's tokens.
        qkv_bias: Whether queries, keys and values have a bias, as in the published models.
        attn_drop: Dropout of both softmaxes' weights, in [0, 1).
        proj_drop: Dropout of the output, in [0, 1).
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ModelError: If ``dim`` is not divisible by ``num_heads``, or ``agents`` is not a square.

    Example:
        >>> layer = AgentAttention(dim=192, num_heads=3, grid=(14, 14), agents=49)
        >>> layer(torch.randn(2, 196, 192)).shape
        torch.Size([2, 196, 192])
        >>> layer(torch.randn(2, 20 * 30, 192), grid=(20, 30)).shape
        torch.Size([2, 600, 192])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: Grid,
        agents: int = 49,
        class_token: bool = False,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ModelError(f"dim: must be divisible by num_heads (got {dim} and {num_heads})")
        self.num_heads = num_heads
        self.agent_side = side_of(agents)
        self.attn_drop = attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, device=device, dtype=dtype)
        self.bias = AgentBias(num_heads, agents, grid, class_token, device, dtype)
        self.dwc = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Reinitialise the weights of the projections, as in the published models."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=STD)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)

    def set_grid(self, grid: Grid) -> None:
        """Change the layer's grid; its biases are resized."""
        self.bias.set_grid(grid)

    def forward(self, x: Tensor, grid: Grid | None = None) -> Tensor:
        """Attend.

        Args:
            x: Tokens ``[B, N, C]``, row by row, after the class token if there is one.
            grid: Height and width of the image in tokens, if not the layer's own.

        Returns:
            ``[B, N, C]``.

        Raises:
            ModelError: If the number of tokens is not that of the grid.
        """
        height, width = grid or self.bias.grid
        class_tokens = int(self.bias.class_token)
        if x.shape[1] != class_tokens + height * width:
            raise ModelError(
                f"{x.shape[1]} tokens are not {' + '.join(['1'] * class_tokens + [''])}"
                f"{height} × {width}; give the grid, or build the model for this image size"
            )

        def image(tokens: Tensor) -> Tensor:
            return torch.unflatten(tokens[:, class_tokens:].mT, 2, (height, width))  # [B, C, h, w]

        def heads(tokens: Tensor) -> Tensor:
            return torch.unflatten(tokens, 2, (self.num_heads, -1)).transpose(1, 2)  # [B, H, ·, d]

        q, k, v = self.qkv(x).chunk(3, dim=-1)  # [B, N, C]
        agents = F.adaptive_avg_pool2d(image(q), self.agent_side).flatten(2).mT  # [B, n, C]
        out = agent_attention(
            heads(q),
            heads(k),
            heads(v),
            heads(agents),
            k_scale2=1.0,
            k_shortcut=0.0,
            biases=self.bias((height, width)),
            attend=self._attend,
        )
        local = self.dwc(image(v)).flatten(2).mT  # [B, h·w, C]
        out = out.transpose(1, 2).flatten(2) + F.pad(local, (0, 0, class_tokens, 0))
        projected: Tensor = self.proj_drop(self.proj(out))
        return projected

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor) -> Tensor:
        # Under autocast, queries are in half precision, but biases are not.
        drop = self.attn_drop if self.training else 0.0
        return softmax_attention(q, k, v, scale, bias.to(q.dtype), drop)
