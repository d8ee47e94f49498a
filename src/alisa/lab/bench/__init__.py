"""Measurements: each prints the physical floor next to the figure and leaves one JSON record. No terminal in here."""
