"""Measurements: each prints the physical floor beside the figure and leaves one JSON record. No terminal in here."""
