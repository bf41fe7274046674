"""The arithmetic of a training step's memory."""
