"""The former home of `CheckpointError`, kept so that existing imports work; see `llava.model.checkpoint`."""

from llava.model.checkpoint import CheckpointError

__all__ = ["CheckpointError"]
