"""Checks a machine or a job before an allocation is spent on it: ``python -m dora_dist.doctor``."""
