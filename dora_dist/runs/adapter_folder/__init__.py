"""The folder of a run's adapter: what it says of itself, and how it is written."""
