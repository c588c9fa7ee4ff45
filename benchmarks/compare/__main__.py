"""`python -m octavo.benchmarks.compare`."""

from .run import main

if __name__ == "__main__":
    main()
