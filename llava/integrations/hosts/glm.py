"""GLM-4.1V (`zai-org/GLM-4.1V-9B-Thinking`): a row per image, and per temporal patch of a video.

As Qwen2-VL; all blocks of the tower attend to whole frames. The placeholders of videos are those of images,
within tokens that open and close a video, so a call has images or videos, not both.
"""

from __future__ import annotations

from .qwen import QwenVLHost


class Glm4vHost(QwenVLHost):
    classes = ("Glm4vForConditionalGeneration",)
    modalities = {"image": "image_token_id", "video": "image_token_id"}
