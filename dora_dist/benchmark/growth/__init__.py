"""Measures a step as layers, width, rank and number of ranks grow."""
