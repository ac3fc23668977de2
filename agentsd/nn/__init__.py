"""Agent attention as the paper trains it: the layer, and with timm the paper's vision models.

Importing this package registers the models, so that ``timm.create_model("agent_deit_tiny")``
makes one. Without timm (``pip install "agentsd[vision]"``) there is the layer alone.
"""

from importlib.util import find_spec

from .attention import AgentAttention
from .bias import AgentBias
from .published import convert_published

if find_spec("timm") is not None:
    from . import cswin, deit, pvt, swin  # noqa: F401  # they register themselves

__all__ = ["AgentAttention", "AgentBias", "convert_published"]
