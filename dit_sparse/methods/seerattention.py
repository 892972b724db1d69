"""SeerAttention: blocks scored by a small learned gate."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from dit_sparse.kernels.ops import work_dtype
from dit_sparse.mask import block_count
from dit_sparse.methods.base import Call, video_blocks
from dit_sparse.methods.estimates import as_mass, block_means
from dit_sparse.methods.scored import BlockScored

# Names of the tensors in a file of gates.
QUERY, KEY = "query", "key"
SHIPPED = Path(__file__).parent / "gates"


@dataclass(frozen=True)
class SeerAttention(BlockScored):
    """Top-k key blocks by a gate that was trained to tell which blocks hold the attention.

    With pooled features ``f_p = mean q`` of a query block and ``g_c = [max k, min k, mean k]`` of a
    key block, and linear maps of each layer and head,

        ``gate[p, c] = (f_p W_q) . (g_c W_k) / sqrt(d)``

    and ``softmax_c gate`` was distilled from the block sums of attention with the model frozen. No
    gates exist for public video models; ``training/seer_gate.py`` trains them for one model.

    The paper pools queries and keys before the rotary embedding and gives the gate one of its own
    at block positions; here they are pooled after it, as a method gets them, and the gate has none.
    The paper distils the maximum of a block, here it is the sum, the share that keeping it saves.
    It keeps blocks above a threshold or the top k; here the top k.

    Attributes:
        sparsity: Share of video blocks that a row skips, in [0, 1).
        weights: Path of the gates, safetensors of ``query [layers, heads, dim, width]`` and
            ``key [layers, heads, 3 dim, width]``, or ``"embedded"``, those that ship for the
            embedded model. None is the identity, which scores by ``mean q . mean k`` and needs no
            training.

    Raises:
        ValueError: On a value outside these ranges; on a call, if the gates do not fit the model.
        FileNotFoundError: On a call, if there is no such file.

    Source: arXiv 2410.13276, section 3.
    """

    name = "seerattention"

    weights: str | None = None

    def scores(self, call: Call) -> Tensor:
        queries, keys, there = gate_features(call, self.block)
        if self.weights is None:
            query, key = (x.to(queries) for x in identity_gate(1, 1, queries.shape[-1]))
            query, key = query[0], key[0]
        else:
            query, key = self._gate(call)
        logits = gate_logits(queries, keys, query.to(queries.dtype), key.to(queries.dtype))
        return as_mass(logits.masked_fill(~there[:, None, None], float("-inf")))

    def _gate(self, call: Call) -> tuple[Tensor, Tensor]:
        query, key = load_gate(str(self.weights), call.q.device)
        heads, dim = call.heads.total, call.q.shape[3]
        expected = (call.layers, heads, dim), (call.layers, heads, 3 * dim)
        if (tuple(query.shape[:3]), tuple(key.shape[:3])) != expected:
            raise ValueError(
                f"the gates of {self.weights} are for (layers, heads, dim) = "
                f"{tuple(query.shape[:3])}, this model has {expected[0]}; train its own with "
                "training/seer_gate.py"
            )
        own = call.heads.own_heads
        return own(query[call.layer][None])[0], own(key[call.layer][None])[0]


def gate_logits(queries: Tensor, keys: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The gate of every pair of blocks, ``[batch, heads, blocks, blocks]``.

    Args:
        queries: Features ``[batch, heads, blocks, dim]``.
        keys: Features ``[batch, heads, blocks, 3 dim]``.
        query: W_q ``[heads, dim, width]``.
        key: W_k ``[heads, 3 dim, width]``.
    """
    return queries.shape[-1] ** -0.5 * ((queries @ query) @ (keys @ key).mT)


def gate_features(call: Call, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the gate sees of the video blocks.

    Args:
        call: Tokens ordered video first.
        block: Tokens in a block.

    Returns:
        Means of queries ``[batch, heads, blocks, dim]``; maxima, minima and means of keys
        ``[batch, heads, blocks, 3 dim]``; and which blocks hold a key, ``[batch | 1, blocks]``.
    """
    tokens = min(video_blocks(call.layout, block) * block, call.layout.video)
    valid = None if call.key_valid is None else call.key_valid[:, :tokens]
    queries, _ = block_means(call.q[:, :tokens], block, valid)
    keys, count = block_means(call.k[:, :tokens], block, valid)
    high = _block_maxima(call.k[:, :tokens], block, valid)
    low = -_block_maxima(-call.k[:, :tokens], block, valid)
    there = count > 0
    extremes = (x.masked_fill(~there[:, None, :, None], 0) for x in (high, low))
    return queries, torch.cat([*extremes, keys], -1), there


def _block_maxima(x: Tensor, block: int, valid: Tensor | None) -> Tensor:
    """``[batch, heads, blocks, dim]``; -inf where no token exists."""
    batch, tokens, heads, dim = x.shape
    if valid is not None:
        x = x.masked_fill(~valid[..., None, None], float("-inf"))
    missing = block_count(tokens, block) * block - tokens
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, missing), value=float("-inf"))
    maxima = x.view(batch, -1, block, heads, dim).amax(2)
    return maxima.transpose(1, 2).to(work_dtype(x.dtype))


def identity_gate(layers: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Gates that score by the product of means: where training starts, and the default."""
    one = torch.eye(dim)
    query = one.expand(layers, heads, -1, -1)
    key = torch.cat([torch.zeros(2 * dim, dim), one]).expand(layers, heads, -1, -1)
    return query, key


def shipped_gates() -> dict[str, Path]:
    """The gates that come with the package, by name."""
    return {path.stem: path for path in SHIPPED.glob("*.safetensors")}


@lru_cache(maxsize=8)
def load_gate(weights: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """W_q and W_k of all layers on ``device``, from a file or shipped; read once."""
    from safetensors.torch import load_file

    shipped = shipped_gates()
    path = shipped.get(weights, Path(weights))
    if not path.is_file():
        raise FileNotFoundError(
            f"expected a file of gates at {weights!r}, got no such file; those that ship are "
            f"{', '.join(sorted(shipped))}"
        )
    tensors = load_file(path, device=str(device))
    if set(tensors) != {QUERY, KEY}:
        raise ValueError(
            f"expected the tensors {QUERY!r} and {KEY!r} in {weights!r}, got {sorted(tensors)}"
        )
    return tensors[QUERY], tensors[KEY]
