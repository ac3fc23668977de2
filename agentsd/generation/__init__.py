"""From settings to images, their records and their files."""
