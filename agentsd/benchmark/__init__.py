"""Time UNet calls: unpatched, patched, and with the baselines."""
