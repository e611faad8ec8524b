"""Apps: a model and a page that runs it in a browser, in one folder for any static server.

A page's source is a folder here (`bedtime/`): plain ES modules that no build step touches. `pack`
puts a model and other people's libraries beside them, `serve` shows the folder with the headers
that threads in a browser need.
"""

from gemma_multi.apps.packing import APPS, AppReport, pack
from gemma_multi.apps.serving import serve

__all__ = ["APPS", "AppReport", "pack", "serve"]
