"""Agent attention as trained in the paper: the layer, and with timm the paper's vision models.

Importing this package registers the models, so that ``timm.create_model("agent_deit_tiny")``
makes one. Without timm (``pip install "agentsd[vision]"``), only the layer is available.
"""

from importlib.util import find_spec
from warnings import warn

from .attention import AgentAttention
from .bias import AgentBias
from .published import convert_published

if find_spec("timm") is not None:
    try:
        from . import models  # noqa: F401  # registers them
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
        warn(
            f"timm cannot be imported ({error}), so it does not know the models of agentsd.nn; "
            "install the torchvision that belongs to the installed torch",
            stacklevel=2,
        )

__all__ = ["AgentAttention", "AgentBias", "convert_published"]
