"""`dit-sparse compare` with a tiny pipeline, to be started as several processes."""

from __future__ import annotations

from tiny_emoji import tiny_pipeline

from dit_sparse.cli import app
from dit_sparse.eval import compare

compare.load_pipeline = lambda *arguments: tiny_pipeline()
app()
