"""`python -m superpose` is `superpose`."""

from superpose.cli import main

if __name__ == "__main__":
    main()
