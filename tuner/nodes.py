"""What a node must be like to take trials."""

from __future__ import annotations


class NodeUnfit(ValueError):
    """This node cannot run trials, whichever they are: no failure of the trial that found it out. The message says what
    is wrong with the node, and the way out."""
