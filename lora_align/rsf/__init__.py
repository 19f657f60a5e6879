"""Directional preference alignment: one policy conditioned on a direction, trained by rejection sampling."""
