"""Policies measured on the same prompts and seeds, with intervals."""
