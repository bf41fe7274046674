"""``python -m dora_dist.benchmark``: speed and memory against the frozen base and PEFT, on the same work."""
