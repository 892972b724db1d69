"""The transformers that are timed: real configurations, random weights, fewer layers.

Configurations that are not the defaults of diffusers 0.42.1 are those of the published checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]

# Weight of the norms of queries and keys, and factor on the projections of values. As initialised,
# attention over random tokens is nearly the mean of the values and little beside the residual
# stream: in bf16 a wrong mask would hardly show in the output of the transformer.
SHARPNESS, VALUE_GAIN = 1.7, 16.0
PADDED_PROMPT = 100  # valid tokens of a prompt that is padded


@dataclass(frozen=True)
class Draw:
    """Random tensors on a device."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(
            shape, generator=self.generator, device=self.device, dtype=torch.float32
        ).to(self.dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Model:
    """A transformer and the generation it is timed in.

    Attributes:
        name: What ``--models`` calls it.
        kind: Class of diffusers.
        config: What differs from the class's defaults.
        stacks: Lists of blocks: attribute, key of its length in the configuration, real length.
        grid: Tokens along (frames, height, width).
        prompt: Text tokens, those of cross-attention too.
        joint_text: Whether self-attention sees the text tokens.
        batch: Elements of one forward pass.
        branches: Cache contexts of one denoising step, a forward pass each.
        goal: Speed-up over the fastest dense backend that this project aims at.
        goal_stock: The same over diffusers as it comes, or None.
        dispatches: Whether ``set_attention_backend`` reaches its self-attention.
        padded: Whether its attention gets a mask for padded text.
        inputs: Forward arguments.
        tiny: Configuration of the variant for tests.
    """

    name: str
    kind: str
    config: dict[str, Any]
    stacks: tuple[tuple[str, str, int], ...]
    grid: tuple[int, int, int]
    prompt: int
    joint_text: bool
    batch: int
    branches: tuple[str, ...]
    goal: float
    goal_stock: float | None
    dispatches: bool
    padded: bool
    inputs: Callable[[Model, Any, Draw], Inputs] = field(repr=False)
    tiny: dict[str, Any] = field(repr=False)

    @property
    def tokens(self) -> int:
        """Tokens that self-attention sees."""
        return math.prod(self.grid) + self.prompt * self.joint_text

    @property
    def depth(self) -> int:
        """Layers in all."""
        return sum(length for *_, length in self.stacks)

    def depths(self, layers: int | None) -> dict[str, int]:
        """Length of each stack with ``layers`` in the longest, by key of the configuration.

        All stacks are cut by one factor, so that time is proportional to depth.

        Raises:
            ValueError: If that is not possible.
        """
        longest = max(length for *_, length in self.stacks)
        layers = longest if layers is None else layers
        found = {key: layers * length / longest for _, key, length in self.stacks}
        if not 1 <= layers <= longest or any(n != int(n) for n in found.values()):
            ratio = ":".join(str(length) for *_, length in self.stacks)
            raise ValueError(
                f"expected a number of layers in [1, {longest}] that keeps the ratio {ratio} of "
                f"{self.name}, got {layers}"
            )
        return {key: int(n) for key, n in found.items()}

    def shrunk(self) -> Model:
        """The variant for tests, of few tokens, four layers a stack."""
        config = {**self.config, **self.tiny}
        stacks = tuple((name, key, 4) for name, key, _ in self.stacks)
        frames = 1 if self.grid[0] == 1 else 4
        return replace(
            self, config=config, stacks=stacks, grid=(frames, 8, 8 if frames > 1 else 32), prompt=16
        )

    def build(self, layers: int | None, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The transformer with random weights, see :meth:`depths` for ``layers``."""
        import diffusers

        torch.manual_seed(0)
        with torch.device(device):
            model = getattr(diffusers, self.kind)(**self.config, **self.depths(layers))
        kept = tuple(model._keep_in_fp32_modules or ())
        for name, parameter in model.named_parameters():
            parts = name.split(".")
            parent = parts[-2] if len(parts) > 1 else ""
            # As from_pretrained does; buffers keep the precision that they are made in.
            if not any(part in kept for part in parts):
                parameter.data = parameter.data.to(dtype)
            if parent in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
                parameter.data.mul_(SHARPNESS)
            elif parent in ("to_v", "add_v_proj"):
                parameter.data.mul_(VALUE_GAIN)
        return model.eval().requires_grad_(False)

    def arguments(
        self, model: Any, device: torch.device, dtype: torch.dtype, seed: int = 1
    ) -> Inputs:
        """Random forward arguments, the same for the same seed."""
        draw = Draw(device, dtype, torch.Generator(device).manual_seed(seed))
        return self.inputs(self, model.config, draw)

    @contextmanager
    def without_blocks(self, model: Any) -> Iterator[None]:
        """Leaves everything of ``model`` but its blocks: what does not grow with its depth."""
        blocks = {name: getattr(model, name) for name, *_ in self.stacks}
        try:
            for name in blocks:
                setattr(model, name, nn.ModuleList())
            yield
        finally:
            for name, stack in blocks.items():
                setattr(model, name, stack)

    def block_bytes(self, model: Any) -> int:
        """Bytes of the weights of all blocks of ``model``."""
        return sum(
            p.numel() * p.element_size()
            for name, *_ in self.stacks
            for p in getattr(model, name).parameters()
        )

    def block_parameters(self, layers: int | None) -> int:
        """Weights of the blocks, without making them."""
        model = self.build(layers, torch.device("meta"), torch.bfloat16)
        return sum(p.numel() for name, *_ in self.stacks for p in getattr(model, name).parameters())

    def forward_flops(self, layers: int | None) -> float:
        """Floating-point operations of a dense forward pass: attention, and 2 a weight and token.

        Too many by the weights that see the text or the timestep alone.
        """
        model = self.build(1 if len(self.stacks) == 1 else 2, torch.device("meta"), torch.bfloat16)
        width = model.config.num_attention_heads * model.config.attention_head_dim
        attention = 4 * self.tokens**2 * width * sum(self.depths(layers).values())
        return self.batch * (attention + 2 * self.tokens * self.block_parameters(layers))


def _wan(model: Model, config: Any, draw: Draw) -> Inputs:
    frames, height, width = model.grid
    return {
        "hidden_states": draw.normal(
            model.batch, config.in_channels, frames, 2 * height, 2 * width
        ),
        "timestep": draw.full(500.0, model.batch),
        "encoder_hidden_states": draw.normal(model.batch, model.prompt, config.text_dim),
    }


def _hunyuan(model: Model, config: Any, draw: Draw) -> Inputs:
    frames, height, width = model.grid
    mask = torch.arange(model.prompt, device=draw.device) < min(PADDED_PROMPT, model.prompt // 2)
    return {
        "hidden_states": draw.normal(
            model.batch, config.in_channels, frames, 2 * height, 2 * width
        ),
        "timestep": draw.full(500.0, model.batch),
        "encoder_hidden_states": draw.normal(model.batch, model.prompt, config.text_embed_dim),
        # In the dtype of the latents, as the pipeline hands it over.
        "encoder_attention_mask": mask.to(draw.dtype).expand(model.batch, -1),
        "pooled_projections": draw.normal(model.batch, config.pooled_projection_dim),
        "guidance": draw.full(6000.0, model.batch),
    }


def _cogvideox(model: Model, config: Any, draw: Draw) -> Inputs:
    frames, height, width = model.grid
    angles = draw.normal(math.prod(model.grid), config.attention_head_dim // 2).float()
    angles = angles.repeat_interleave(2, dim=1)
    shape = (config.patch_size_t * frames, config.in_channels, 2 * height, 2 * width)
    return {
        "hidden_states": draw.normal(model.batch, *shape),
        "timestep": draw.full(500.0, model.batch),
        "encoder_hidden_states": draw.normal(model.batch, model.prompt, config.text_embed_dim),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _flux(model: Model, config: Any, draw: Draw) -> Inputs:
    _, height, width = model.grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).view(-1, 3)
    return {
        "hidden_states": draw.normal(model.batch, height * width, config.in_channels),
        "timestep": draw.full(0.5, model.batch),
        "encoder_hidden_states": draw.normal(model.batch, model.prompt, config.joint_attention_dim),
        "pooled_projections": draw.normal(model.batch, config.pooled_projection_dim),
        "guidance": draw.full(3.5, model.batch),
        "img_ids": ids.to(draw.device, draw.dtype),
        "txt_ids": draw.full(0.0, model.prompt, 3),
    }


_TINY_HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def _wan_model(
    name: str, layers: int, grid: tuple[int, int, int], goal: float, **config: Any
) -> Model:
    return Model(
        name, "WanTransformer3DModel", config, (("blocks", "num_layers", layers),),
        grid=grid, prompt=512, joint_text=False, batch=1, branches=("cond", "uncond"),
        goal=goal, goal_stock=None, dispatches=True, padded=False, inputs=_wan,
        tiny={**_TINY_HEADS, "ffn_dim": 64, "text_dim": 8, "freq_dim": 16},
    )  # fmt: skip


# From cheap to dear.
MODELS = {
    model.name: model
    for model in (
        Model(
            "flux-2048", "FluxTransformer2DModel", {"guidance_embeds": True},
            (("transformer_blocks", "num_layers", 19),
             ("single_transformer_blocks", "num_single_layers", 38)),
            grid=(1, 128, 128), prompt=512, joint_text=True, batch=1, branches=("cond",),
            goal=1.2, goal_stock=None, dispatches=True, padded=False, inputs=_flux,
            tiny={**_TINY_HEADS, "joint_attention_dim": 8, "pooled_projection_dim": 8,
                  "axes_dims_rope": (8, 12, 12)},
        ),
        _wan_model("wan-1.3b", 30, (21, 30, 52), 1.45, num_attention_heads=12, ffn_dim=8960),
        Model(
            "cogvideox-1.5", "CogVideoXTransformer3DModel",
            {"num_attention_heads": 48, "patch_size_t": 2, "patch_bias": False,
             "sample_height": 300, "sample_width": 300, "sample_frames": 81,
             "use_rotary_positional_embeddings": True},
            (("transformer_blocks", "num_layers", 42),),
            # 21 latent frames and one of padding, two a token. Both CFG branches are one batch.
            grid=(11, 48, 85), prompt=226, joint_text=True, batch=2, branches=("cond_uncond",),
            goal=1.7, goal_stock=None, dispatches=False, padded=False, inputs=_cogvideox,
            tiny={**_TINY_HEADS, "text_embed_dim": 8, "time_embed_dim": 16},
        ),
        _wan_model("wan-14b", 40, (21, 45, 80), 1.7),
        Model(
            "hunyuanvideo", "HunyuanVideoTransformer3DModel", {},
            (("transformer_blocks", "num_layers", 20),
             ("single_transformer_blocks", "num_single_layers", 40)),
            grid=(33, 45, 80), prompt=256, joint_text=True, batch=1, branches=("cond",),
            goal=2.0, goal_stock=3.0, dispatches=True, padded=True, inputs=_hunyuan,
            tiny={**_TINY_HEADS, "num_refiner_layers": 1, "text_embed_dim": 8,
                  "pooled_projection_dim": 8, "rope_axes_dim": (8, 12, 12)},
        ),
    )
}  # fmt: skip
