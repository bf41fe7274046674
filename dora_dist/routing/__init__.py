"""Prompt-routed LoRA: for every prompt and decoder block, a router chooses the modules that are adapted."""
