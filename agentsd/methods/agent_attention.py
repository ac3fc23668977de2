"""Agent attention on plain tensors (Han et al., ECCV 2024, arXiv 2312.08874)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

Attend = Callable[..., Tensor]
"""Softmax attention ``(q, k, v, scale) -> out``, all of shape ``[B, H, ·, d]``; with a fifth
argument, a bias ``[1, H, queries, keys]`` added to the logits."""


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """PyTorch's scaled dot-product attention; shapes as in :func:`agent_attention`."""
    return F.scaled_dot_product_attention(q, k, v, bias, dropout_p=dropout, scale=scale)


def agent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    agents: Tensor,
    *,
    k_scale2: float = 0.3,
    k_shortcut: float = 0.075,
    biases: tuple[Tensor, Tensor] | None = None,
    attend: Attend = softmax_attention,
) -> Tensor:
    """Attend through a few agent tokens, at a cost linear in the number of tokens.

    The agents first gather from the keys, then every query reads from the agents
    (arXiv 2312.08874, eq. 3; ``k_scale2`` and ``k_shortcut`` come from its training-free use in
    Stable Diffusion)::

        V_A = softmax(A Kᵀ · d^-0.5) V
        O   = softmax(Q Aᵀ · d^(-0.5·k_scale2)) V_A + k_shortcut · V

    Args:
        q: Queries ``[B, H, N, d]``.
        k: Keys ``[B, H, N, d]``.
        v: Values ``[B, H, N, d]``, one per query, since ``k_shortcut`` adds them to the output.
        agents: Agent queries ``[B, H, n, d]``, usually ``n`` much smaller than ``N``.
        k_scale2: Exponent of the second softmax's scale. Below 1 it is sharper than usual.
        k_shortcut: Share of the values added to the output, which restores diversity.
        biases: Added to the logits of the two softmaxes, ``[1, H, n, N]`` and ``[1, H, N, n]``:
            B₁ and B₂ of the trained module (eq. 5), computed by :class:`agentsd.nn.AgentBias`.
        attend: Softmax attention function; PyTorch's by default.

    Returns:
        ``[B, H, N, d]`` in the dtype of ``q``.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 2, 8, 64, 40).unbind(0)
        >>> agent_attention(q, k, v, agents=q[:, :, ::16]).shape
        torch.Size([2, 8, 64, 40])
    """
    scale = q.shape[-1] ** -0.5
    first, second = ((), ()) if biases is None else ((biases[0],), (biases[1],))
    agent_values = attend(agents, k, v, scale, *first)  # [B, H, n, d]
    out = attend(q, agents, agent_values, scale**k_scale2, *second)  # [B, H, N, d]
    return out + k_shortcut * v if k_shortcut else out
