"""`python -m shadowc`."""

from shadowc.cli import main

if __name__ == "__main__":
    main()
