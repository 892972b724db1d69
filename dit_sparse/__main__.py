"""``python -m dit_sparse``: the command line, for launchers that take a module."""

from dit_sparse.cli import app

app()
