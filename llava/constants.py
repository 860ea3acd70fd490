"""Names and ids that LLaVA's users import. Nothing here depends on anything."""

CONTROLLER_HEART_BEAT_EXPIRATION = 30  # seconds
WORKER_HEART_BEAT_INTERVAL = 15  # seconds

LOGDIR = "."

# In labels: a position that the loss leaves out.
IGNORE_INDEX = -100
# In input ids: the place where an image's embeddings go. No vocabulary has it.
IMAGE_TOKEN_INDEX = -200

DEFAULT_IMAGE_TOKEN = "<image>"
DEFAULT_IMAGE_PATCH_TOKEN = "<im_patch>"
DEFAULT_IM_START_TOKEN = "<im_start>"
DEFAULT_IM_END_TOKEN = "<im_end>"
IMAGE_PLACEHOLDER = "<image-placeholder>"
