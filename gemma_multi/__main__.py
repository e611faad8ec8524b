"""`python -m gemma_multi` is the command line."""

from gemma_multi.cli import main

if __name__ == "__main__":
    main()
