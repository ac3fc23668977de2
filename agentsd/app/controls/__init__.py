"""The controls of an image, and what is expected of its size and schedule."""
