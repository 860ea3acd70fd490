"""Tiny random models of the host classes of transformers, with inputs: `llava.integrations.tiny_hosts`."""

from __future__ import annotations

from llava.integrations.tiny_hosts import HOSTS, Batch, HostCase

__all__ = ["HOSTS", "Batch", "HostCase"]
