"""Policies and judges, found by name: vectors, mixes, conditioned policies, the start policy."""
