"""``dora-dist generate``: answers of the base and of the adapter, and conversations."""
