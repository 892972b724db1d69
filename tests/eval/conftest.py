"""A tiny pipeline for all tests here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_emoji import tiny_pipeline

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline()
