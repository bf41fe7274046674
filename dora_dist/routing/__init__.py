"""Prompt-routed LoRA: for every prompt and decoder block, a router chooses which modules are adapted."""
