"""How long a call of the UNet takes: unpatched, patched, and with the baselines."""
