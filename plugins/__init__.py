"""The methods that medrl brings, one package each."""

if not __name__.startswith("medrl."):
    raise ImportError(
        "import this package as 'medrl.plugins': run 'pip install -e .' "
        "and do not put the repository root on sys.path"
    )
