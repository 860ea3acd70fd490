"""From patch features to the language model's embeddings."""
