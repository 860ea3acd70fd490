"""Model inference over questions: engine, image loading, vision cache. Decoding is in `llava.model`."""
