"""Pipelines: loaded, configured with schedulers and adapters, or built without weights."""
