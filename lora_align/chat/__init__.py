"""Talk to a mix, and change its weights while it talks."""
