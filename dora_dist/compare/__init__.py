"""Compares methods: ``python -m dora_dist.compare CONFIG``.

Every cell (task, budget, method, learning rate, seed) is an ordinary run folder. Every method's learning rate is chosen
from the same grid, on a split that is not the reported one.
"""
