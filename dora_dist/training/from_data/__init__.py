"""What is made of training rows before the first step: directions to start in, and ranks."""
