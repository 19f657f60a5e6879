"""The built-in world: a small language, a base model that speaks it, and the demo."""
