"""Rank-one components inside a model: the layers, the PEFT model, and plain LoRA on disk."""
