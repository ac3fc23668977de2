"""Features of images and prompts: networks that compute them, and a cache on disk."""

from .clip import Clip
from .extraction import Features, extract
from .extractor import Extractor
from .loading import load_clip, load_extractor

__all__ = ["Clip", "Extractor", "Features", "extract", "load_clip", "load_extractor"]
