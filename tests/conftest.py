"""Property tests draw the same cases on every run, so that a red run is red for everybody.

python -m pytest --hypothesis-profile explore       # other cases on every run: look for what was missed
"""

import os

from hypothesis import settings

# Encoded images of one test would be found by the next; tests of the store choose their own folder.
os.environ["VISPRUNER_VISION_CACHE"] = "0"

settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile("repeatable")
