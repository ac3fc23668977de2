"""Everything that touches a live UNet."""
