"""``python -m dora_dist.benchmark``: speed and memory compared with the frozen base and PEFT, on the same work."""
