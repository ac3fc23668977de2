"""Image quality: metrics of image sets and of pairs, experiments, and their reports."""
