"""Uses training rows before the first step: to choose initial directions, and to choose ranks."""
