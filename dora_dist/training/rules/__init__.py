"""What an event does to the components: one class for each value of ``pruning.rule``, and what it scores by."""
