"""Exporters: one module per format, each writing a Checkpoint out.

Installed as `gemma_multi.exporters`. The formats arrive with the LiteRT release; until then this
package holds only its name.
"""
