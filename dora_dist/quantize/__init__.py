"""Writes a base in 4 bits, once for many runs."""
