"""Runs the command line: ``python -m medrl.cli``, which is also what torchrun starts."""

from medrl.cli.main import main

if __name__ == "__main__":
    main()
