"""Answers on disk: answer files, shards of several processes, provenance, atomic writes."""
