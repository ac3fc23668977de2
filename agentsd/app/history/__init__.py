"""Settings put back: from earlier images, files and links."""
