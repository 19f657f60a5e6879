"""Mixes, runs and policies measured side by side: the same prompts, the same seeds, intervals on everything."""
