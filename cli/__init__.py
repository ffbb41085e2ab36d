"""The command line: everything that talks to people.

Each command has a file of its own and imports what it needs when it runs, so that ``medrl --help`` loads no
torch.
"""

if not __name__.startswith("medrl."):
    raise ImportError(
        "import this package as 'medrl.cli': run 'pip install -e .' "
        "and do not put the repository root on sys.path"
    )
