"""Talk to a mix, and turn its weights while it talks."""
