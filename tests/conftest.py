"""Shared by all tests: where real data lies, and a hypothesis profile without deadlines."""

from hypothesis import settings

settings.register_profile("cmim", deadline=None, max_examples=40, derandomize=True, print_blob=True)
settings.load_profile("cmim")
