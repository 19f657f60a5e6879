"""Commands that need no package of their own: one file each."""
