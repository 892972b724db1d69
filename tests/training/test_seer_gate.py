"""Distillation of gates on a tiny pipeline and on made-up attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_emoji import tiny_pipeline

from dit_sparse import SparseConfig, enable_sparse_attention
from dit_sparse.methods.seerattention import SeerAttention, load_gate
from dit_sparse.pipelines.embedded import load_embedded
from dit_sparse.pipelines.emoji_video import EmojiVideoPipeline
from dit_sparse.processors.binding import binding_of
from training.seer_gate import Example, Gate, recorder, train, training_captions

SIZE = {"num_frames": 4, "height": 64, "width": 128, "num_inference_steps": 3}


@pytest.fixture
def pipe() -> EmojiVideoPipeline:
    # Sharp enough that attention has something to learn.
    pipeline = tiny_pipeline(words=["a", "heart"], sharpness=8)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def example(gate_like: int = 0, key_valid: Any = None) -> Example:
    """Attention that the minimum of a key channel decides, which means cannot tell."""
    rng = torch.Generator().manual_seed(gate_like)
    queries = torch.ones(1, 1, 6, 4)
    keys = torch.randn(1, 1, 6, 12, generator=rng)
    target = (3 * keys[..., 4]).softmax(-1)[..., None, :].expand(1, 1, 6, 6)
    return Example(0, queries, keys, torch.ones(1, 6, dtype=torch.bool), target)


def test_a_gate_learns_what_means_do_not_show() -> None:
    gate = Gate(1, 1, 4)
    optimizer = torch.optim.AdamW(gate.parameters(), lr=0.03, weight_decay=0.0)
    losses = []
    for step in range(150):
        loss = gate.loss(example(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    with torch.no_grad():
        fresh = torch.stack([gate.loss(example(1000 + n)) for n in range(20)]).mean()
        start = torch.stack([Gate(1, 1, 4).loss(example(1000 + n)) for n in range(20)]).mean()
    assert fresh < 0.1 * start


def test_the_loss_is_the_divergence_of_rows_that_exist() -> None:
    one = example()
    gate = Gate(1, 1, 4)
    target = one.target.clone()
    target[:, :, 3] = 0  # a query block of padding
    padded = Example(0, one.queries, one.keys, one.there, target)
    logits = (one.queries @ one.keys[..., 8:].mT) / 2
    rows = torch.nn.functional.kl_div(logits.log_softmax(-1), one.target, reduction="none").sum(-1)[
        0, 0
    ]
    torch.testing.assert_close(gate.loss(one), rows.mean())
    kept = torch.tensor([0, 1, 2, 4, 5])
    torch.testing.assert_close(gate.loss(padded), rows[kept].mean())


def test_recorded_targets_are_shares_of_attention(pipe: Any) -> None:
    examples: list[Example] = []
    handle = enable_sparse_attention(pipe, SparseConfig(recorder(64, (4, 4, 4), examples)))
    with_us = pipe(
        "a heart",
        **SIZE,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    handle.remove()
    without = pipe(
        "a heart",
        **SIZE,
        guidance_scale=1.0,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
    ).frames
    assert torch.equal(with_us, without)
    assert [e.layer for e in examples] == [0, 1] * 3
    for one in examples:
        assert one.target.shape == (1, 2, 4, 4)
        torch.testing.assert_close(one.target.sum(-1), torch.ones(1, 2, 4))


def test_training_runs_saves_and_is_used(pipe: Any, tmp_path: Path) -> None:
    lines: list[str] = []
    before = {name: p.clone() for name, p in pipe.transformer.named_parameters()}

    def trained(lr: float) -> tuple[Gate, list[float]]:
        options = {"trajectories": 4, "lr": lr, "block": 64, "tile": (2, 4, 8)}
        captions = iter(["a heart"] * 4)
        return train(pipe, captions, log=lines.append, guidance_scale=1.0, **options, **SIZE)  # type: ignore

    gate, losses = trained(1e-3)
    # The same clips, and nothing learned from them.
    _, still = trained(0.0)
    assert len(losses) == len(still) == 4
    assert sum(losses) < 0.98 * sum(still)
    assert len(lines) == 8
    assert "4/4" in lines[-1]
    assert binding_of(pipe.transformer) is None
    for name, parameter in pipe.transformer.named_parameters():
        assert torch.equal(parameter, before[name])
    path = tmp_path / "gate.safetensors"
    gate.save(path, block="64")
    method = SeerAttention(0.5, str(path), warmup=0, tile=(2, 4, 8))
    with enable_sparse_attention(pipe, SparseConfig(method)) as handle:
        pipe("a heart", **SIZE, guidance_scale=1.0, output_type="latent")
        assert handle.report().sparse_density == pytest.approx(0.5)


def test_captions_are_not_held_out_and_repeat_with_the_seed() -> None:
    one, two = training_captions(0), training_captions(0)
    first = [next(one) for _ in range(5)]
    assert first == [next(two) for _ in range(5)]
    assert len(set(first)) > 1


def test_the_gates_that_ship_know_the_embedded_model() -> None:
    pipeline = load_embedded("cpu")
    pipeline.set_progress_bar_config(disable=True)
    examples: list[Example] = []
    with enable_sparse_attention(pipeline, SparseConfig(recorder(64, (4, 4, 4), examples))):
        pipeline(
            "a star moving up over a sunset sky, still camera",
            num_inference_steps=2,
            guidance_scale=1.0,
            generator=torch.Generator().manual_seed(1),
            output_type="latent",
        )
    query, key = load_gate("embedded", torch.device("cpu"))
    trained, start = Gate(7, 6, 64), Gate(7, 6, 64)
    trained.load_state_dict({"query": query.float(), "key": key.float()})
    with torch.no_grad():
        losses = [
            float(torch.stack([gate.loss(one) for one in examples]).mean())
            for gate in (trained, start)
        ]
    assert losses[0] < 0.7 * losses[1]
    with enable_sparse_attention(pipeline, "seerattention", weights="embedded") as sparse:
        pipeline("a star", num_inference_steps=1, guidance_scale=1.0, output_type="latent")
        assert 0.1 < sparse.report().density < 0.4
