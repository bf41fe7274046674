"""Shows the data of a run before it starts."""
