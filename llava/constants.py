"""Names and ids that LLaVA's users import. No dependencies."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds

LOGDIR = "."

# In labels: a position that the loss ignores.
IGNORE_INDEX = -100
# In input ids: the position of an image's embeddings. Not in any vocabulary.
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
DEFAULT_VID_START_TOKEN = "<vid_start>"
DEFAULT_VID_END_TOKEN = "<vid_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
