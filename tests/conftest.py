"""Settings that must hold before any test module is imported."""

import os

import torch

# Triton reads this when a kernel file is first imported, whichever test that is.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
