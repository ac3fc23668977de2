"""A pyramid of stages of Transformer blocks, which PVT and CSWin share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from timm.layers import LayerNorm2d, to_2tuple, trunc_normal_
from timm.models import checkpoint
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from ...errors import ModelError
from ..attention import AgentAttention
from ..bias import STD, Grid
from ..published import resize_position_embedding


class GridBlock(Block):  # type: ignore[misc]  # timm is untyped
    """timm's block, which passes the grid to its attention."""

    def __init__(self, attention: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.attn = attention

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """Attention and feed-forward network of tokens ``[B, N, C]``, each with a residual."""
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        out: Tensor = x + self.drop_path2(self.mlp(self.norm2(x)))
        return out


class StageSpec(NamedTuple):
    """Specification of a stage."""

    depth: int
    width: int
    heads: int
    mlp_ratio: float
    reduction: tuple[int, int, int]
    """Kernel, stride and padding of the convolution that it starts with."""
    attention: Callable[[Grid], nn.Module]
    """Builds a block's attention for a grid."""


class Stage(nn.Module):
    """Reduce an image by a convolution, then attend to its tokens.

    Args:
        spec: Its specification.
        in_chans: Channels of the image.
        in_size: Height and width of the image.
        drop_path: Rate of each block.
        position: Whether it has a position embedding.
        options: Options of timm's block, shared by all blocks.
    """

    def __init__(
        self,
        spec: StageSpec,
        in_chans: int,
        in_size: Grid,
        drop_path: Sequence[float],
        position: bool,
        **options: Any,
    ) -> None:
        super().__init__()
        self.reduction = spec.reduction
        self.proj = nn.Conv2d(in_chans, spec.width, *spec.reduction)
        self.norm = nn.LayerNorm(spec.width)
        self.grid_size = self.grid_of(in_size)
        self.pos_embed = None
        if position:
            self.pos_embed = nn.Parameter(
                torch.empty(1, self.grid_size[0] * self.grid_size[1], spec.width)
            )
            trunc_normal_(self.pos_embed, std=STD)
        self.blocks = nn.ModuleList(
            GridBlock(
                spec.attention(self.grid_size),
                dim=spec.width,
                num_heads=spec.heads,
                mlp_ratio=spec.mlp_ratio,
                drop_path=rate,
                **options,
            )
            for rate in drop_path
        )
        self.grad_checkpointing = False

    def grid_of(self, size: Grid) -> Grid:
        """Height and width of the output for an image's height and width."""
        kernel, stride, padding = self.reduction
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in size)
        return height, width

    def set_input_size(self, size: Grid) -> None:
        """Resize what depends on the height and width of the image."""
        grid = self.grid_of(size)
        if self.pos_embed is not None:
            resized = resize_position_embedding(self.pos_embed.detach(), self.grid_size, grid)
            self.pos_embed = nn.Parameter(resized)
        self.grid_size = grid
        for module in self.modules():
            if isinstance(module, AgentAttention):
                module.set_grid(grid)

    def forward(self, image: Tensor) -> Tensor:
        """``[B, C, H, W]`` to ``[B, C', h, w]``."""
        image = self.proj(image)
        grid = (image.shape[2], image.shape[3])
        x = self.norm(image.flatten(2).mT)  # [B, h·w, C']
        if self.pos_embed is not None:
            x = x + resize_position_embedding(self.pos_embed, self.grid_size, grid)
        for block in self.blocks:
            x = checkpoint(block, x, grid) if self.grad_checkpointing else block(x, grid)
        return torch.unflatten(x.mT, 2, grid)


class Pyramid(nn.Module):
    """Stages of decreasing resolution, followed by pooling and a classifier.

    Images of any size can be given, and biases and position embeddings are resized in each call.

    Args:
        stages: Specifications of the stages.
        img_size: Height and width of images, or their side.
        in_chans: Channels of images.
        num_classes: Number of classes; 0 for none.
        global_pool: ``"avg"``, or ``""`` to classify each position.
        position: Whether each stage has a position embedding.
        final_norm: Whether the last features are normalised.
        norm_eps: Epsilon of the blocks' layer norms.
        drop_rate: Dropout before the classifier.
        drop_path_rate: Of the last block; it grows linearly from 0 in the first.
    """

    def __init__(
        self,
        stages: Sequence[StageSpec],
        *,
        img_size: int | Grid = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        position: bool,
        final_norm: bool,
        norm_eps: float,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        self.global_pool = global_pool
        blocks = sum(spec.depth for spec in stages)
        rates = iter([drop_path_rate * block / max(1, blocks - 1) for block in range(blocks)])
        made: list[Stage] = []
        self.feature_info: list[dict[str, Any]] = []
        size, reduction = to_2tuple(img_size), 1
        for index, spec in enumerate(stages):
            made.append(
                Stage(
                    spec,
                    in_chans,
                    size,
                    list(islice(rates, spec.depth)),
                    position,
                    qkv_bias=True,
                    proj_drop=proj_drop_rate,
                    norm_layer=partial(nn.LayerNorm, eps=norm_eps),
                )
            )
            in_chans, size = spec.width, made[-1].grid_size
            reduction *= spec.reduction[1]
            self.feature_info.append(
                {"num_chs": spec.width, "reduction": reduction, "module": f"stages.{index}"}
            )
        self.stages = nn.Sequential(*made)
        self.num_features = self.head_hidden_size = in_chans
        self.norm = LayerNorm2d(in_chans, eps=norm_eps) if final_norm else nn.Identity()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=STD)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to features ``[B, C, h, w]``."""
        features: Tensor = self.norm(self.stages(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits."""
        x = x.mean(dim=(2, 3)) if self.global_pool else x.movedim(1, -1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, 3, H, W]`` to logits ``[B, classes]``."""
        return self.forward_head(self.forward_features(x))

    def set_input_size(self, img_size: int | Grid) -> None:
        """Change the image size; position embeddings and biases are resized."""
        size = to_2tuple(img_size)
        stage: Any
        for stage in self.stages:
            stage.set_input_size(size)
            size = stage.grid_size

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay: none besides those that timm excludes itself."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of parameters by layer, for layer-wise learning rates."""
        depth = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        return {"stem": r"^stages\.0\.(proj|norm|pos_embed)", "blocks": depth}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of storing them."""
        stage: Any
        for stage in self.stages:
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the last layer."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if self.global_pool not in ("avg", ""):
            raise ModelError(f"global_pool: must be 'avg' or '' (got {self.global_pool!r})")
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
