"""The frozen 4-bit base, what is laid over it, and what it says."""
