"""Export formats of a trained adapter."""
