"""Find the fastest schedule for a model, device and quality budget, by measuring."""
