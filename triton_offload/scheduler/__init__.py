"""The scheduler side: which chunks are where, for how long. No device, no torch."""
