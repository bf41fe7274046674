"""A look at the data of a run before it starts."""
