"""The language models LLaVA is built on."""
