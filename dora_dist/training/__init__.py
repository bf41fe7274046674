"""The training loop and the state of the method while it runs."""
