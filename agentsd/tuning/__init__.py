"""The fastest schedule that a model, a device and an eye allow, found by measuring."""
