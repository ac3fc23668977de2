"""The paper's vision models, on timm's blocks; importing this package registers them with timm."""

from . import cswin, deit, pvt, swin

__all__ = ["cswin", "deit", "pvt", "swin"]
