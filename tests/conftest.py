"""For all tests: how long an example takes is the machine's affair."""

from hypothesis import settings

settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")
