"""Batches: a task over a file of rows, resumed where it was killed, on this machine or on Ray.

`run` takes a file and writes a file; `ray_processor` is for those who have a pipeline of Ray Data.
"""

from __future__ import annotations

from gemma_multi.batch.on_ray import ray_processor
from gemma_multi.batch.options import BatchOptions, BatchReport, RayOptions
from gemma_multi.batch.run import run

__all__ = ["BatchOptions", "BatchReport", "RayOptions", "ray_processor", "run"]
