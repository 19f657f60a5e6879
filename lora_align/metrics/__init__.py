"""Measures of answers and scores, intervals on them, and plots."""
