"""Pruning in other trainers: transformers' Trainer and its subclasses, such as TRL's."""
