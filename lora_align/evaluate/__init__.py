"""Instruments: what a mix does, measured and drawn."""
