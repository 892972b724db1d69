"""What an offline search has measured so far, in a file from which it can go on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

VERSION = 1


class SearchState:
    """Losses by generation and forward pass.

    Attributes:
        path: The file; None keeps everything in memory.
        key: What the losses depend on, as plain data.
        facts: Other plain data to keep: shapes, measured costs, finished generations, progress.
        losses: ``[layers, heads, modes]`` fp32 by name of the forward pass; NaN where not measured.
    """

    def __init__(self, path: Path | None, key: dict[str, Any]) -> None:
        self.path = path
        self.key = json.loads(json.dumps(key))
        self.facts: dict[str, Any] = {"finished": [], "progress": {}}
        self.losses: dict[str, Tensor] = {}
        if path is not None and path.exists():
            self._load(path)

    def _load(self, path: Path) -> None:
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads(file.metadata()["state"])
                losses = {name: file.get_tensor(name) for name in header.get("names", ())}
        except Exception as error:
            raise ValueError(
                f"expected the state of a search in {str(path)!r}, got an unreadable file "
                f"({error}); delete it or pass another --state"
            ) from error
        key = header["key"]
        if header["version"] != VERSION or key != self.key:
            names = sorted(k for k in {*key, *self.key} if key.get(k) != self.key.get(k))
            raise ValueError(
                f"{str(path)!r} holds another search (it differs in {', '.join(names)}); delete it "
                "or pass another --state"
            )
        self.facts, self.losses = header["facts"], losses

    def save(self) -> None:
        """Writes everything; an interrupt while writing leaves the file as it was."""
        if self.path is None:
            return
        header = {
            "version": VERSION,
            "key": self.key,
            "facts": self.facts,
            # In the order of the search, which the tensors of a file are not.
            "names": list(self.losses),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        save_file(self.losses, partial, metadata={"state": json.dumps(header)})
        os.replace(partial, self.path)

    def get(self, name: str, layer: int) -> Tensor | None:
        """The losses ``[heads, modes]`` of one layer in one forward pass, if they are known."""
        losses = self.losses.get(name)
        if losses is None or bool(losses[layer].isnan().any()):
            return None
        return losses[layer]

    def put(self, name: str, layer: int, layers: int, losses: Tensor) -> None:
        """Keeps the losses of one layer."""
        if name not in self.losses:
            self.losses[name] = torch.full((layers, *losses.shape), float("nan"))
        self.losses[name][layer] = losses
