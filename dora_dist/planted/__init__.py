"""A controlled truth: a frozen teacher that differs from the base by updates of known ranks, and what allocates them.

The student starts from the base with real dynamic-rank layers and learns the teacher's distribution; the ranks that it
keeps are held against those that were planted.
"""
