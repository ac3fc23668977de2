"""The version, apart from the public names so that any module may import it."""

__version__ = "0.2.0.dev0"
