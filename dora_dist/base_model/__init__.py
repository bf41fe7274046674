"""The frozen model: reading, quantizing, describing it, and computing its loss."""
