"""Trains the gates of :class:`dit_sparse.methods.seerattention.SeerAttention` for one model.

Example:
    python -m training.seer_gate --output gate.safetensors --trajectories 200
    dit-sparse compare --methods "adaspa,seerattention:weights=gate.safetensors"

The model is frozen: it generates clips of training captions with dense attention, and after every
denoising step the gate of each layer and head learns the shares that key blocks have in the
attention of query blocks. It starts from the product of block means, so it never starts below
pooled selection. A gate belongs to the model, the block and the order of tokens (tile) that it was
trained with.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dit_sparse import SparseConfig, enable_sparse_attention
from dit_sparse.methods.base import Call, Method
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.estimates import video_mass
from dit_sparse.methods.seerattention import KEY, QUERY, gate_features, gate_logits, identity_gate
from dit_sparse.schedule import Phase


@dataclass(frozen=True)
class Example:
    """One attention call as the gate sees it.

    Attributes:
        layer: Index of the layer.
        queries, keys, there: Features, see :func:`gate_features`.
        target: Share of key blocks in the attention of query blocks to video,
            ``[batch, heads, blocks, blocks]``.
    """

    layer: int
    queries: Tensor
    keys: Tensor
    there: Tensor
    target: Tensor


def recorder(block: int, tile: tuple[int, int, int] | None, examples: list[Example]) -> Method:
    """Dense attention that notes examples.

    Args:
        block: Tokens in a block.
        tile: Order of the video tokens.
        examples: Where they go.
    """

    # Inside the function, because every method class that exists is offered to users.
    @dataclass(frozen=True, eq=False)
    class Recorder(Dense):
        name = "seer-recorder"
        # An example is of all heads of a layer.
        splits_heads = False

        def attend(self, call: Call) -> Tensor:
            call.record(Phase.DENSE)
            moved = call.ordered(call.tile_order(tile))
            mass = video_mass(moved, moved.q, moved.k, block)
            # To video alone: text is kept in any case.
            target = mass / mass.sum(-1, keepdim=True).clamp_min(1e-30)
            examples.append(Example(call.layer, *gate_features(moved, block), target))
            return call.dense()

    return Recorder()


class Gate(nn.Module):
    """The gates of all layers and heads.

    Args:
        layers: Self-attention layers.
        heads: Heads of a layer.
        dim: Channels of a head.
    """

    def __init__(self, layers: int, heads: int, dim: int) -> None:
        super().__init__()
        query, key = identity_gate(layers, heads, dim)
        self.query, self.key = nn.Parameter(query.clone()), nn.Parameter(key.clone())

    def loss(self, example: Example) -> Tensor:
        """Mean Kullback-Leibler divergence of the gate's softmax from the target, in nats."""
        layer = example.layer
        logits = gate_logits(
            example.queries, example.keys, self.query[layer], self.key[layer]
        ).masked_fill(~example.there[:, None, None], float("-inf"))
        guess = logits.log_softmax(-1).clamp_min(-100)
        # Rows of padding have no target and teach nothing.
        target = example.target
        divergence = (torch.xlogy(target, target) - target * guess).sum(-1)
        taught = target.sum(-1) > 0
        return (divergence * taught).sum() / taught.sum().clamp(min=1)

    def save(self, path: Path, **metadata: str) -> None:
        """Writes what ``SeerAttention(weights=path)`` reads."""
        tensors = {QUERY: self.query, KEY: self.key}
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, metadata)


def train(
    pipe: Any,
    captions: Iterator[str],
    *,
    trajectories: int,
    lr: float,
    block: int,
    tile: tuple[int, int, int] | None,
    seed: int = 0,
    log: Callable[[str], None] = print,
    **arguments: Any,
) -> tuple[Gate, list[float]]:
    """Trains gates on generations of ``pipe``.

    Args:
        pipe: Its transformer stays as it is.
        captions: What to generate.
        trajectories: Clips to generate; each gives one update a denoising step.
        lr: Learning rate of AdamW; falls to zero along a cosine.
        block: Tokens in a block.
        tile: Order of the video tokens.
        seed: Of the noise.
        log: Gets a line a clip.
        **arguments: Of the pipeline's call, such as sizes and steps.

    Returns:
        The gates and the mean loss of every clip.
    """
    examples: list[Example] = []
    handle = enable_sparse_attention(pipe, SparseConfig(recorder(block, tile, examples)))
    gate: Gate | None = None
    optimizer: Any = None
    losses: list[list[float]] = []

    def after_step(pipe: Any, index: int, timestep: Any, tensors: dict) -> dict:
        nonlocal gate, optimizer
        if gate is None:
            _, heads, _, dim = examples[0].queries.shape
            layers = 1 + max(example.layer for example in examples)
            gate = Gate(layers, heads, dim).to(examples[0].queries.device)
            optimizer = torch.optim.AdamW(gate.parameters(), lr=lr, weight_decay=0.0)
        # The pipeline runs without gradients.
        with torch.enable_grad():
            loss = torch.stack([gate.loss(example) for example in examples]).mean()
            loss.backward()
        progress = torch.tensor((len(losses) - 1) / trajectories * torch.pi)
        optimizer.param_groups[0]["lr"] = lr * float(1 + progress.cos()) / 2
        optimizer.step()
        examples.clear()
        optimizer.zero_grad()
        losses[-1].append(float(loss.detach()))
        return tensors

    try:
        for number in range(trajectories):
            losses.append([])
            pipe(
                prompt=next(captions),
                generator=torch.Generator("cpu").manual_seed(seed + number),
                output_type="latent",
                callback_on_step_end=after_step,
                **arguments,
            )
            log(f"clip {number + 1}/{trajectories}: loss {sum(losses[-1]) / len(losses[-1]):.4f}")
    finally:
        handle.remove()
    assert gate is not None
    return gate, [sum(clip) / len(clip) for clip in losses]


def training_captions(seed: int) -> Iterator[str]:
    """Captions of random scenes that are not held out."""
    from dit_sparse.pipelines.captions import sample_training_scene

    rng = random.Random(seed)
    while True:
        yield sample_training_scene(rng).caption()


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    from dit_sparse.pipelines.embedded import load_embedded
    from training.train import parse_size

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, help="safetensors file to write")
    add("--model", type=Path, default=None, help="folder of another embedded model")
    add("--trajectories", type=int, default=200, help="clips to generate")
    add("--steps", type=int, default=12, help="denoising steps of a clip, an update each")
    add("--size", default="16x128x128", help="FRAMESxHEIGHTxWIDTH of a clip")
    add("--guidance", type=float, default=1.0)
    add("--lr", type=float, default=3e-4)
    add("--block", type=int, choices=(64, 128), default=64)
    add("--tile", default="4x4x4", help="order of the video tokens, or 'raster'")
    add("--seed", type=int, default=0)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)

    tile = None
    if options.tile != "raster":
        tile = tuple(int(n) for n in options.tile.split("x"))
    frames, height, width = parse_size(options.size)
    pipe = load_embedded(options.device, path=options.model)
    pipe.set_progress_bar_config(disable=True)
    gate, losses = train(
        pipe,
        training_captions(options.seed),
        trajectories=options.trajectories,
        lr=options.lr,
        block=options.block,
        tile=tile,
        seed=options.seed,
        num_frames=frames,
        height=height,
        width=width,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
    )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    gate.save(options.output, block=str(options.block), tile=options.tile)
    print(f"wrote {options.output}; loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last")


if __name__ == "__main__":
    main()
