"""Work for the device: one job at a time, its progress, and how long it takes."""
