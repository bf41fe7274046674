"""A base that is written in 4 bits once."""
