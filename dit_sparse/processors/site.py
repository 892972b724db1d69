"""One self-attention layer of a bound model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_sparse.layout import TokenLayout
from dit_sparse.methods.base import Call
from dit_sparse.processors.masks import read_mask
from dit_sparse.processors.op import register_site
from dit_sparse.processors.operands import Operands
from dit_sparse.processors.padding import attend_kept, kept_tokens
from dit_sparse.processors.ulysses import Exchange, TokenSplit, model_order
from dit_sparse.processors.upstream import upstream_attention

if TYPE_CHECKING:
    from dit_sparse.processors.binding import Binding


class Scope:
    """What the current forward pass tells its layers. Plain attributes, so Dynamo can trace it."""

    def __init__(self) -> None:
        self.timestep: Tensor | None = None
        self.layout = torch.zeros(0, dtype=torch.int64)
        self.positions: Tensor | None = None


class Site:
    """One self-attention layer of a bound model."""

    def __init__(self, binding: Binding, index: int, name: str, module: Any, original: Any) -> None:
        self.binding = binding
        self.scope = binding.scope
        self.index = index
        self.name = name
        self.module = module
        self.original = original
        self.handle = register_site(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        # A copied model must not reach the state of the original through its handle.
        new = memo[id(self)] = Site.__new__(Site)
        for name, value in vars(self).items():
            if name != "handle":
                setattr(new, name, copy.deepcopy(value, memo))
        new.handle = register_site(new)
        return new

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        timestep: Tensor | None,
        numbers: Sequence[int],
        positions: Tensor | None,
        scale: float | None,
        sdpa: bool,
    ) -> Tensor:
        """Self-attention ``[batch, tokens, heads, dim]`` by the bound method."""
        binding, family, run = self.binding, self.binding.family, self.binding.run
        devices = binding.devices()
        if run.is_new_pass(self.index):
            binding.passing = ForwardPass(family.decode(numbers, positions))
        layout = family.site_layout(self.name, binding.passing.layout)
        split, here = None, layout.tokens
        if devices is not None:
            split = TokenSplit(family.streams(binding.model, numbers, layout), devices.size)
            here = split.tokens[devices.rank]
        missing = None
        if q.shape[1] != here or k.shape[1] != here:
            if k.shape[1] == layout.tokens:
                missing = family.unqueried(layout, q.shape[1])
            if missing is None and type(self.original).__name__ in family.side_calls:
                processor = self.module.processor
                return upstream_attention(processor, q, k, v, attn_mask, scale, sdpa)[0]
            if devices or missing is None or q.shape[1] + missing[1] != layout.tokens:
                raise RuntimeError(
                    f"{self.name} attends over {q.shape[1]} queries and {k.shape[1]} keys, but the "
                    f"forward arguments describe {here} tokens ({layout})"
                )
        branch = run.enter(self.index, timestep, binding.passing.layout, binding.timesteps(), q)
        exchange = None
        if devices is not None and split is not None:
            heads = binding.balance.heads(
                self.index, q.shape[2], devices.size, branch.step.generation
            )
            exchange = Exchange(devices, split, heads)
            q, k, v = (exchange.to_heads(x) for x in (q, k, v))
            attn_mask = None if attn_mask is None else binding.passing.mask(attn_mask, exchange)
        mask = read_mask(
            attn_mask, q.shape[0], layout, self.name, family.outer_mask, family.penalty_mask
        )
        operands = Operands(q, k, v, layout, mask.valid, scale)
        if exchange is not None:
            operands = operands.ordered(model_order(exchange.split, q.device))
        if missing is not None:
            operands = operands.with_queries(*missing)
        if mask.weights is not None:
            operands = operands.with_weights(mask.weights)
        if len(numbers) > 5 and positions is None:
            operands = operands.rotated(numbers[5:])
        binding.check_numerics(operands.q)
        call = Call(
            q=operands.q,
            k=operands.k,
            v=operands.v,
            layout=operands.layout,
            step=branch.step,
            layer=self.index,
            layers=len(binding.sites),
            key_valid=operands.valid,
            memory=branch.memory.setdefault(self.index, {}),
            scale=operands.scale,
            impl=binding.config.impl,
            dense_attention=lambda with_lse: operands.enter_with_lse(
                *self._dense(q, k, v, attn_mask, mask.valid, scale, sdpa, with_lse)
            ),
            dense_layers=binding.config.dense_layers,
            shared=run.shared,
            notes=run.notes,
            model=binding.identity,
            share=None if exchange is None else exchange.share(),
            models_waiting=binding.models_waiting,
            precision=binding.config.attention_precision,
        )
        stop = run.attention_watch.start(q.device)
        out = operands.leave(binding.attend(call))
        stop()
        if exchange is None:
            run.note(call)
            return out
        density = exchange.all_heads(head_density(call))
        binding.balance.note(self.index, density.mean(0))
        run.note(call, density, exchange.heads)
        return exchange.to_tokens(out)

    def _dense(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None,
        valid: Tensor | None,
        scale: float | None,
        sdpa: bool,
        with_lse: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The model's own attention and, if asked for and to be had for free, its row LSE."""
        binding, processor = self.binding, self.module.processor
        trims = binding.family.always_trims or binding.config.dense_padding == "trim"
        if not trims or valid is None:
            return upstream_attention(processor, q, k, v, attn_mask, scale, sdpa, with_lse)
        kept = binding.passing.kept(valid)
        if binding.family.always_trims and not all(isinstance(part, slice) for part in kept):
            raise NotImplementedError(
                f"{self.name}: the padding must be at the end of the text; with padding inside it "
                f"{type(binding.model).__name__} itself shifts the text that follows"
            )

        def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return upstream_attention(processor, q, k, v, None, scale, sdpa)[0]

        return attend_kept(attention, q, k, v, kept), None


class ForwardPass:
    """What is the same for all layers of one forward pass, read from the device once."""

    def __init__(self, layout: TokenLayout) -> None:
        self.layout = layout
        self._kept: dict[int, list[slice | Tensor]] = {}
        self._masks: dict[tuple[int, ...], Tensor] = {}

    def kept(self, valid: Tensor) -> list[slice | Tensor]:
        """:func:`kept_tokens` of ``valid``. The padding of a pass is the same in all its layers."""
        tokens = valid.shape[1]
        if tokens not in self._kept:
            self._kept[tokens] = kept_tokens(valid)
        return self._kept[tokens]

    def mask(self, mask: Tensor, exchange: Exchange) -> Tensor:
        """:meth:`Exchange.all_tokens` of ``mask``, which is the same in all layers as well."""
        shape = tuple(mask.shape)
        if shape not in self._masks:
            self._masks[shape] = exchange.all_tokens(mask)
        return self._masks[shape]


def head_density(call: Call) -> Tensor:
    """Density of each head of ``call``, ``[batch | 1, heads]`` fp32; 1 where it was dense."""
    if call.head_density is None:
        return torch.ones(1, call.q.shape[2], device=call.q.device)
    return call.head_density.float().expand(-1, call.q.shape[2]).mean(0, keepdim=True)
