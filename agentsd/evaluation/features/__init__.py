"""Features of images and prompts: networks that compute them, and a cache on disk."""

from .extraction import Features, extract
from .extractors import Clip, Extractor, load_clip, load_extractor

__all__ = ["Clip", "Extractor", "Features", "extract", "load_clip", "load_extractor"]
