"""The paper's vision models, on timm's blocks; importing this package registers them with timm."""

from importlib.util import find_spec

from ...errors import MissingPackageError

if find_spec("timm") is None:
    raise MissingPackageError("timm", "agentsd.nn.models", "vision")

from . import cswin, deit, pvt, swin  # which import timm

__all__ = ["cswin", "deit", "pvt", "swin"]
