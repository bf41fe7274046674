"""Methods beside each other: ``python -m dora_dist.compare CONFIG``.

Every cell (task, budget, method, learning rate, seed) is an ordinary run folder. The learning rate is chosen for every
method over the same grid, on a split that is not the reported one.
"""
