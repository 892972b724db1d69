"""What several processes check together; each function runs in all of them.

``test_parallel.py`` starts the processes once, lets them go through all checks and reads what came
out. Every process computes the single-process result itself to compare with.
"""

from __future__ import annotations

import json
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from features import FAMILIES
from tiny_models import Draw, tiny_models
from torch import Tensor

from dit_sparse import AdaSpa, SparseConfig, context_parallel_plan, enable_sparse_attention
from dit_sparse.methods.dense import Dense, FullMask
from dit_sparse.methods.moa import MoA

CHECKS: dict[str, Callable[[], None]] = {}
METHOD = AdaSpa(sparsity=0.5, search=(1,))
TIMES = (900.0, 700.0, 500.0)
TINY = {tiny.name: tiny for tiny in tiny_models()}
HAS_ANYTHING = "ulysses_anything" in {field.name for field in fields(ContextParallelConfig)}
ANYTHING = {"ulysses_anything": True} if HAS_ANYTHING else {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


@dataclass(frozen=True, eq=False)
class Case:
    """One model and inputs of one size.

    Attributes:
        name: Of the tiny model.
        grid: Tokens of the video.
        text: Text tokens to leave, where the number matters.
        config: Changes to the configuration.
        without: Arguments to give as None.
        anything: Whether lengths need not be divisible by the number of devices.
    """

    name: str
    grid: tuple[int, int, int]
    text: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    anything: bool = False

    def build(self) -> Any:
        """A model whose attention concentrates, so that masks matter."""
        tiny = TINY[self.name]
        model = replace(tiny, config=tiny.config | self.config).build()
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter.data *= 3
        return model

    def split(self, model: Any) -> None:
        """Splits the sequence over all devices, by our plan where diffusers has none."""
        options = {"ulysses_anything": True} if self.anything else {}
        config = ContextParallelConfig(ulysses_degree=dist.get_world_size(), **options)
        model.enable_parallelism(config=config, cp_plan=context_parallel_plan(model))

    def run(self, model: Any) -> list[Tensor]:
        """A generation by hand: the same inputs at falling timesteps."""
        tiny = TINY[self.name]
        inputs = tiny.inputs(Draw(), self.grid, 2)
        for name in self.without:
            inputs[name] = None
        if self.text is not None:
            names = ("encoder_hidden_states", "encoder_hidden_states_mask")
            for name in (*names, "encoder_attention_mask"):
                if inputs.get(name) is not None:
                    inputs[name] = inputs[name][:, : self.text]
            if "txt_ids" in inputs:
                ids = inputs["txt_ids"]
                inputs["txt_ids"] = ids[..., : self.text, :]
        scale = 1.0 if float(inputs["timestep"].max()) > 1 else 1e-3
        outs = []
        for t in TIMES:
            inputs["timestep"] = torch.full_like(inputs["timestep"], t * scale)
            outs.append(model(**inputs, return_dict=False)[0])
        return outs


def apart(outs: list[Tensor], others: list[Tensor]) -> float:
    """Largest difference of two generations, relative to the largest value."""
    differences = [float((a - b).abs().max()) for a, b in zip(outs, others, strict=True)]
    return max(differences) / max(float(b.abs().max()) for b in others)


def equal(outs: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(outs, others, strict=True))


def agree(*values: float) -> None:
    """All devices have the same values."""
    mine = torch.tensor(values, dtype=torch.float64)
    largest = mine.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    assert torch.equal(largest, mine), (largest, mine)


def follows(case: Case) -> None:
    """On several devices everything is what it is on one, in both orders of switching on."""
    has_plan = type(case.build())._cp_plan is not None
    plain = case.run(case.build())
    upstream: list[Tensor] = []
    if has_plan:
        model = case.build()
        case.split(model)
        upstream = case.run(model)
        assert apart(upstream, plain) < 1e-5
    for method in (Dense(), FullMask(), METHOD):
        model = case.build()
        with enable_sparse_attention(model, method) as sparse:
            alone = case.run(model)
            single = sparse.report()
        if method is METHOD:
            assert apart(alone[1:], plain[1:]) > 1e-4
        for first in ("sparse", "split") if has_plan else ("sparse",):
            model = case.build()
            if first == "split":
                case.split(model)
            sparse = enable_sparse_attention(model, SparseConfig(method, strict=True))
            if first == "sparse":
                case.split(model)
            outs, report = case.run(model), sparse.report()
            assert apart(outs, alone) < 1e-5, (method, first, apart(outs, alone))
            if has_plan:
                dense = {"dense": len(TIMES), "full": 0, "adaspa": 1}[method.name]
                assert equal(outs[:dense], upstream[:dense]), (method, first)
            agree(report.density, report.imbalance)
            assert report.dense_steps == single.dense_steps
            assert report.sparse_steps == single.sparse_steps
            # Every device knows the densities of all heads, in the model's order.
            for layer, wanted in zip(report.layers, single.layers, strict=True):
                assert layer["head_density"] == pytest.approx(wanted["head_density"])
            if has_plan:
                sparse.remove()
                assert equal(case.run(model), upstream)


FOUR = {"num_attention_heads": 4}


@check
def wan() -> None:
    follows(Case("WanTransformer3DModel", (4, 6, 8), config=FOUR))


@check
def wan_with_a_timestep_for_each_token() -> None:
    follows(Case("WanTransformer3DModel-per-token", (4, 6, 8), config=FOUR))


@check
def wan_uneven() -> None:
    if HAS_ANYTHING:
        follows(
            Case(
                "WanTransformer3DModel", (3, 7, 9), config={"num_attention_heads": 3}, anything=True
            )
        )


@check
def chrono_edit() -> None:
    follows(Case("ChronoEditTransformer3DModel", (4, 6, 8), config=FOUR))


@check
def ltx() -> None:
    # With a padding mask diffusers 0.42 itself fails here, in cross-attention.
    without = ("encoder_attention_mask",)
    follows(Case("LTXVideoTransformer3DModel", (4, 6, 8), text=4, without=without))


@check
def flux() -> None:
    follows(Case("FluxTransformer2DModel", (1, 12, 16), text=6, config=FOUR))


@check
def flux_uneven() -> None:
    if HAS_ANYTHING:
        follows(Case("FluxTransformer2DModel-kontext", (1, 11, 13), config=FOUR, anything=True))


@check
def flux2() -> None:
    follows(Case("Flux2Transformer2DModel", (1, 12, 16), text=6, config=FOUR))


@check
def qwen() -> None:
    follows(Case("QwenImageTransformer2DModel", (1, 12, 16), text=6))


@check
def qwen_uneven() -> None:
    if HAS_ANYTHING:
        follows(Case("QwenImageTransformer2DModel", (1, 11, 13), anything=True))


@check
def hunyuan_video() -> None:
    follows(Case("HunyuanVideoTransformer3DModel", (4, 6, 8), text=6, config=FOUR))


@check
def hunyuan_video_uneven() -> None:
    if HAS_ANYTHING:
        follows(Case("HunyuanVideoTransformer3DModel", (3, 7, 9), anything=True))


@check
def cogvideox() -> None:
    follows(Case("CogVideoXTransformer3DModel", (4, 6, 8), config=FOUR))


@check
def cogvideox_uneven() -> None:
    if HAS_ANYTHING:
        follows(Case("CogVideoXTransformer3DModel-rotary", (3, 7, 9), anything=True))


@check
def heads_are_dealt_out_by_density() -> None:
    """From the second generation on, every layer by what its heads cost in the last."""
    case = Case("WanTransformer3DModel", (4, 8, 12), config=FOUR)
    # Heads that keep little next to each other in the first layer, apart in the second.
    method = MoA(plan=((0, 0, 6, 6), (0, 6, 0, 6)), warmup=1)
    model = case.build()
    with enable_sparse_attention(model, method) as sparse:
        alone = case.run(model)
        assert sparse.report().imbalance == 1.0
        densities = [layer["head_density"] for layer in sparse.report().layers]
    low, high = densities[0][0], densities[0][3]
    assert low < 0.4 and high == 1.0
    model = case.build()
    sparse = enable_sparse_attention(model, method)
    case.split(model)
    loads = []
    for _ in range(3):
        assert apart(case.run(model), alone) < 1e-5
        report = sparse.report()
        loads.append(report.imbalance)
        assert [layer["head_density"] for layer in report.layers] == densities
    # The first layer has everything on one device, the second is even.
    mean = low + high
    assert loads[0] == pytest.approx((2 * high + mean) / (2 * mean))
    assert loads[1] == loads[2] == 1.0
    log = sparse.bindings[0].run.log
    assert log["call", 0].owners == ((0, 2), (1, 3)) and log["call", 1].owners == ((0, 1), (2, 3))


@check
def image_prompts() -> None:
    """Attention over image prompts stays on each device: every query sees all of them."""
    case = Case("FluxTransformer2DModel", (1, 12, 16), text=6, config=FOUR)
    prompt = [torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(3))]

    def build() -> Any:
        model = case.build()
        torch.manual_seed(0)
        for block in model.transformer_blocks:
            block.attn.set_processor(FluxIPAdapterAttnProcessor(64, 8))
        forward = model.forward
        model.forward = lambda **given: forward(
            **given, joint_attention_kwargs={"ip_hidden_states": prompt}
        )
        return model

    plain = case.run(build())
    assert apart(plain, case.run(case.build())) > 1e-4
    model = build()
    with enable_sparse_attention(model, METHOD):
        alone = case.run(model)
    model = build()
    enable_sparse_attention(model, METHOD)
    case.split(model)
    assert apart(case.run(model), alone) < 1e-5


@check
def compiled_blocks() -> None:
    case = Case("WanTransformer3DModel", (4, 6, 8), config=FOUR)
    model = case.build()
    with enable_sparse_attention(model, METHOD):
        alone = case.run(model)
    model = case.build()
    sparse = enable_sparse_attention(model, METHOD)
    case.split(model)
    # The hooks of diffusers break the graph.
    model.compile_repeated_blocks(backend="eager")
    assert apart(case.run(model), alone) < 1e-5
    assert sparse.report().sparse_steps == 2


@check
def a_pipeline() -> None:
    tiny = FAMILIES["Wan"]
    pipe = tiny.build()
    with enable_sparse_attention(pipe, METHOD):
        alone = [tiny.run(pipe), tiny.run(pipe, size=1, seed=1)]
    pipe = tiny.build()
    sparse = enable_sparse_attention(pipe, METHOD)
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    together = [tiny.run(pipe), tiny.run(pipe, size=1, seed=1)]
    assert apart(together, alone) < 1e-5
    assert {layer["branch"] for layer in sparse.report().layers} == {"cond", "uncond"}


@check
def pipelines_of_models_with_our_plans() -> None:
    for family in ("CogVideoX", "HunyuanVideo"):
        tiny = FAMILIES[family]
        pipe = tiny.build()
        with enable_sparse_attention(pipe, METHOD):
            alone = tiny.run(pipe)
        pipe = tiny.build()
        enable_sparse_attention(pipe, SparseConfig(METHOD, strict=True))
        pipe.transformer.enable_parallelism(
            config=ContextParallelConfig(ulysses_degree=2, **ANYTHING),
            cp_plan=context_parallel_plan(pipe.transformer),
        )
        assert apart([tiny.run(pipe)], [alone]) < 1e-5, family


@check
def step_caches() -> None:
    tiny = FAMILIES["Wan"]
    by_step = MagCacheConfig(
        threshold=10.0, max_skip_steps=1, num_inference_steps=6, mag_ratios=[1.0] * 6
    )
    pipe = tiny.build()
    pipe.transformer.enable_cache(by_step)
    with enable_sparse_attention(pipe, METHOD) as sparse:
        alone = tiny.run(pipe, steps=6)
        assert sparse.report().layers[0]["phases"] == {"search": 1, "sparse": 2}

    def split(cache: Any) -> Any:
        pipe = tiny.build()
        enable_sparse_attention(pipe, SparseConfig(METHOD, strict=True))
        # The other way round upstream takes the whole sequence in and a part of it out.
        pipe.transformer.enable_cache(cache)
        pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        return pipe

    assert apart([tiny.run(split(by_step), steps=6)], [alone]) < 1e-5
    pipe = split(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RuntimeError, match=r"FirstBlockCacheConfig decides on each device"):
        tiny.run(pipe)


@check
def what_needs_all_heads_is_refused() -> None:
    case = Case("WanTransformer3DModel", (4, 6, 8), config=FOUR)
    model = case.build()
    sparse = enable_sparse_attention(model, "tidaldecode")
    case.split(model)
    with pytest.raises(NotImplementedError, match=r"'tidaldecode' needs all heads.*'adaspa'"):
        case.run(model)
    sparse.remove()
    with pytest.raises(NotImplementedError, match="needs all heads"):
        enable_sparse_attention(model, "tidaldecode")
    enable_sparse_attention(model, "adaspa")


@check
def fewer_heads_than_devices_are_refused() -> None:
    """On all devices, before any of them waits for another."""
    if HAS_ANYTHING:
        one = {"num_attention_heads": 1}
        case = Case("WanTransformer3DModel", (4, 6, 8), config=one, anything=True)
        model = case.build()
        enable_sparse_attention(model, METHOD)
        case.split(model)
        with pytest.raises(ValueError, match="got 1 heads for 2 devices"):
            case.run(model)


@check
def a_model_that_cannot_do_without() -> None:
    case = Case("CogVideoXTransformer3DModel", (4, 6, 8), config=FOUR)
    model = case.build()
    sparse = enable_sparse_attention(model, "dense")
    case.split(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = enable_sparse_attention(model, METHOD)
    case.run(model)
    with pytest.warns(UserWarning, match="stays split over devices"):
        sparse.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse.remove()


def on_processors() -> None:
    """Makes diffusers' context parallelism run on CPUs, with gloo."""
    # It counts accelerators, of which there need not be any.
    torch.accelerator.device_count = lambda: 1  # type: ignore[method-assign]
    all_gather = dist.all_gather

    def gather(tensors: list[Tensor], tensor: Tensor, group: Any = None) -> None:
        if len({one.shape for one in tensors}) == 1:
            all_gather(tensors, tensor, group=group)
            return
        # NCCL gathers different sizes as broadcasts; gloo refuses them.
        for rank, one in enumerate(tensors):
            if rank == dist.get_rank(group):
                one.copy_(tensor)
            dist.broadcast(one, group=group, group_src=rank)

    dist.all_gather = gather


def main(rank: int, size: int, folder: Path, names: list[str]) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=60),
    )
    torch.set_num_threads(1)
    on_processors()
    results = {}
    for name in names:
        started = time.perf_counter()
        try:
            with torch.no_grad():
                CHECKS[name]()
            results[name] = ""
        except BaseException:
            results[name] = traceback.format_exc()
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4].split(","))
