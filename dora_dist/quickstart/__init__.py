"""A backbone and instruction data generated on the spot, so that the quickstart needs no network."""
