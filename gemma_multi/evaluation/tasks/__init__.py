"""What can be measured, a module a task with one record, `TASK`; adding one is adding a file."""

from __future__ import annotations

from functools import cache

from gemma_multi.evaluation.task import Task
from gemma_multi.registry import find_records


@cache
def tasks() -> dict[str, Task]:
    """All of them by name."""
    return {task.name: task for task in find_records(__name__, "TASK", Task)}
