"""The method in trainers of other people: transformers' Trainer and those that are made from it."""
