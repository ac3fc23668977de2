"""A comparison: its images, made and kept, and how they are shown."""
