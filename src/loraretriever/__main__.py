"""`python -m loraretriever`."""

from loraretriever.cli import main

if __name__ == "__main__":  # worker processes import this file
    main()
