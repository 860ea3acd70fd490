"""Training of the bundled model: features, tokenizer, student, trainer and export."""
