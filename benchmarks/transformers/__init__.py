"""Whole transformers: what sparse attention saves of a generation, against dense diffusers."""
