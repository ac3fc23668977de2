"""What goes on inside the layers, drawn on the image."""
