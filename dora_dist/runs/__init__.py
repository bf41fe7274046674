"""The folder of a run: records, checkpoints, summary, pictures."""
