"""The demo world: a small artificial language, a base model trained on it, and the demo command."""
