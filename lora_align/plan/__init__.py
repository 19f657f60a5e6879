"""Predict what each stage will take in memory and time, before it runs."""
