"""Properties are tried without a deadline: the speed of a shared machine says nothing about the program."""

from hypothesis import settings

settings.register_profile("shared machine", deadline=None)
settings.load_profile("shared machine")
