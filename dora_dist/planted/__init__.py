"""An experiment with known ranks: how well do methods recover the ranks of a frozen teacher?

The teacher differs from the base by updates of planted ranks. A student starts from the base with real dynamic-rank
layers and learns the teacher's distribution. The ranks it keeps are compared with the planted ones.
"""
