"""Model inference over questions: engine, image loading, vision cache. Decoding itself is in `llava.model`."""
