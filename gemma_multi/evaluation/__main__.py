"""`lm_eval` with this package's models known to it: `python -m gemma_multi.evaluation ...`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs lm_eval's own command line."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError:
        sys.exit("gemma-multi: the harness needs: pip install 'gemma-multi[eval]'")
    import gemma_multi.evaluation.harness  # noqa: F401  which registers the model

    cli_evaluate()


if __name__ == "__main__":
    main()
