"""Judges: a score from 0 to 100, or an abstention with its reason."""
