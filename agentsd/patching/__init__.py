"""All that touches a live UNet."""
