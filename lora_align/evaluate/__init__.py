"""Evaluation: measure policies on the same prompts and seeds, compare them, and search for weights."""
