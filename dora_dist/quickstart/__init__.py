"""Generates a backbone and instruction data, so that the quickstart needs no network."""
