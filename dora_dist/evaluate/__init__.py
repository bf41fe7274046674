"""``dora-dist evaluate``: base and adapter on the tasks of lm-eval-harness."""
