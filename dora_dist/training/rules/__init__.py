"""Pruning rules: one class for each value of ``pruning.rule``, and the scores measured at events."""
