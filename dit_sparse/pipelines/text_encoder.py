"""A word-level caption encoder that is trained together with the diffusion transformer."""

from __future__ import annotations

from difflib import get_close_matches

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import nn
from torch.nn import functional as F

from dit_sparse.pipelines.captions import words_of

PAD_ID = 0
UNKNOWN_ID = 1
_FIRST_WORD_ID = 2
_EXAMPLES = 6


class CaptionBlock(nn.Module):
    """Pre-norm transformer encoder layer."""

    def __init__(self, dim: int, heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.ffn_in = nn.Linear(dim, ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Maps x [B, L, D] to [B, L, D]; mask [B, 1, 1, L] is True where a key may be read."""
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.ffn_out(F.gelu(self.ffn_in(self.norm2(x))))


class CaptionEncoder(ModelMixin, ConfigMixin):
    """Encodes captions of a fixed vocabulary.

    The vocabulary is part of the config, so that a saved folder needs no tokenizer files. Ids: 0 is
    padding, 1 an unknown word, 2 + i is `words[i]`. The empty caption (all padding) encodes to
    zeros and is the unconditional caption.

    Args:
        words: The vocabulary.
        max_words: Captions are padded to this many ids.
        dim: Width of the output.
        num_layers: Transformer layers.
        num_heads: Attention heads.
        ffn_dim: Hidden width of the feed-forward layers.
    """

    @register_to_config
    def __init__(
        self,
        words: tuple[str, ...] | list[str] = (),
        max_words: int = 24,
        dim: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        ffn_dim: int = 256,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(len(words) + _FIRST_WORD_ID, dim)
        self.position_embedding = nn.Parameter(0.02 * torch.randn(max_words, dim))
        self.blocks = nn.ModuleList(
            CaptionBlock(dim, num_heads, ffn_dim) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.token_embedding.weight, std=0.5)
        self._ids = {word: index + _FIRST_WORD_ID for index, word in enumerate(words)}

    def tokenize(self, text: str) -> list[int]:
        """Ids of a caption, padded to `max_words`; words outside the vocabulary map to 1.

        Raises:
            ValueError: If the caption is not a string or has more than `max_words` words.
        """
        if not isinstance(text, str):
            raise ValueError(
                f"expected a caption of type str, got {type(text).__name__}; pass one string"
            )
        ids = [self._ids.get(word, UNKNOWN_ID) for word in words_of(text)]
        limit = self.config.max_words
        if len(ids) > limit:
            raise ValueError(
                f"expected a caption of at most {limit} words, got {len(ids)}; shorten {text!r}"
            )
        return ids + [PAD_ID] * (limit - len(ids))

    def unknown_words(self, text: str) -> list[str]:
        """Words of a caption that are not in the vocabulary, each once.

        Raises:
            ValueError: If nothing in a caption is in the vocabulary; an empty one is fine.
        """
        words = words_of(text)
        unknown = [word for word in dict.fromkeys(words) if word not in self._ids]
        if text.strip() and not self._ids.keys() & set(words):
            raise ValueError(
                f"expected a caption with words that this model knows, got {text!r}; "
                f"{self.known_words(unknown)}"
            )
        return unknown

    def known_words(self, unknown: list[str]) -> str:
        """A hint that names a few words of the vocabulary, those like ``unknown`` first."""
        words = list(self.config.words)
        close = [match for word in unknown for match in get_close_matches(word, words)]
        spread = words[:: max(1, len(words) // _EXAMPLES)]
        examples = list(dict.fromkeys(close + spread))[:_EXAMPLES]
        return f"use for example {', '.join(examples)}; pipe.text_encoder.config.words lists all"

    def tokenize_batch(self, captions: list[str]) -> torch.Tensor:
        """Ids [B, max_words] (int64, on the CPU) of a list of captions."""
        return torch.tensor([self.tokenize(text) for text in captions], dtype=torch.long)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Encodes ids.

        Args:
            input_ids: [B, L] with L <= max_words.

        Returns:
            [B, L, dim], zero at padding.
        """
        if input_ids.ndim != 2 or input_ids.shape[1] > self.config.max_words:
            raise ValueError(
                f"expected input_ids of shape [B, L <= {self.config.max_words}], "
                f"got {list(input_ids.shape)}; use tokenize_batch()"
            )
        length = input_ids.shape[1]
        valid = input_ids != PAD_ID
        # An empty caption would leave softmax without any key: the first position stays readable,
        # which changes nothing for other captions (they have a word there).
        readable = valid | (torch.arange(length, device=input_ids.device) == 0)
        x = self.token_embedding(input_ids) + self.position_embedding[:length]
        for block in self.blocks:
            x = block(x, readable[:, None, None, :])
        return self.norm(x) * valid.unsqueeze(-1).to(x.dtype)

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Encodes captions to [B, max_words, dim] on the device of the encoder."""
        return self(self.tokenize_batch(captions).to(self.device))
