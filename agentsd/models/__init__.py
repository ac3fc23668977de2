"""Load pipelines, configure schedulers and adapters, or build UNets without weights."""
