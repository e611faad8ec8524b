"""What a small model is for: to put a text into a class, send it somewhere, take facts out of it.

Each task is a prompt (`prompts`), whose instruction and examples are read once for many texts, and
a way to read the answer that needs no parsing of free text.
"""

from gemma_multi.tasks.batch import BatchRow, batch
from gemma_multi.tasks.classification import Classification, classify
from gemma_multi.tasks.embedding import embed
from gemma_multi.tasks.extraction import extract
from gemma_multi.tasks.routing import route

__all__ = ["BatchRow", "Classification", "batch", "classify", "embed", "extract", "route"]
