"""Model inference over questions: engine, decoding, shared prefixes, image loading, vision cache."""
