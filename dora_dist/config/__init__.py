"""What a user sets: plain, checked values, without torch."""
