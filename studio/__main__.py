"""`python -m studio`: the command line; also what torchrun starts."""

from studio.cli import main

if __name__ == "__main__":
    main()
