"""Where sparse attention goes: one model family a file, and how it is bound to a model."""
