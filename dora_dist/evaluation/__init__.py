"""Held-out figures: losses, metrics, generated answers."""
