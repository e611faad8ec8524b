"""The hub of the star: everything that is read becomes a Checkpoint, everything written comes
from one."""

from gemma_multi.checkpoint.checkpoint import Checkpoint

__all__ = ["Checkpoint"]
