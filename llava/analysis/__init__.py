"""Analysis: overlays of the kept tokens, and efficiency (time, memory, FLOPs)."""
