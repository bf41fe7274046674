"""Trains methods of PEFT on the data, steps and schedule of a run of this project."""
