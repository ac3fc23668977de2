"""Runs of many images: prompts from files, made in batches, resumed, by several processes."""
