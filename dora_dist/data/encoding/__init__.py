"""From samples to token ids and the tokens that are trained."""
