"""Nodes that cannot do their work."""

from __future__ import annotations


class NodeUnfit(ValueError):
    """A node cannot run trials, whatever the trial; the message says why, and the way out."""
