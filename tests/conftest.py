"""Property tests draw the same cases on every run, so that a red run is red for everybody.

python -m pytest --hypothesis-profile explore       # other cases on every run: look for what was missed
"""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")
