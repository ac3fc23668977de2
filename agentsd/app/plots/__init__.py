"""X/Y plots."""
