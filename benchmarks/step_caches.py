"""The step caches of diffusers, on the embedded model."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dit_sparse import SparseConfig, SparseProcessor


def cache_config(name: str, value: float, steps: int, ratios: list[float] | None) -> Any:
    """The diffusers configuration of a step cache.

    Args:
        name: ``"fbcache"``, ``"taylorseer"`` or ``"magcache"``.
        value: Its threshold or interval.
        steps: Denoising steps.
        ratios: Of :func:`magcache_ratios`, for MagCache.
    """
    from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig

    if name == "fbcache":
        return FirstBlockCacheConfig(threshold=value)
    if name == "taylorseer":
        # Its default identifiers match no module of Wan.
        return TaylorSeerCacheConfig(
            cache_interval=int(value),
            disable_cache_before_step=3,
            cache_identifiers=[r"blocks\.\d+\.attn1", r"blocks\.\d+\.attn2", r"blocks\.\d+\.ffn"],
        )
    if ratios is None:
        raise ValueError("magcache needs the ratios of a calibration run")
    return MagCacheConfig(
        threshold=value, max_skip_steps=4, num_inference_steps=steps, mag_ratios=ratios
    )


@contextmanager
def switched_on(
    pipe: Any, cache: Any | None, config: SparseConfig | None
) -> Iterator[SparseProcessor | None]:
    """A cache and a method on the pipeline's transformer, and off again."""
    processor = None
    if cache is not None:
        pipe.transformer.enable_cache(cache)
    try:
        if config is not None:
            processor = SparseProcessor(config).install(pipe.transformer, pipe)
        yield processor
    finally:
        if processor is not None:
            processor.remove()
        if cache is not None:
            pipe.transformer.disable_cache()


def magcache_ratios(transformer: Any, steps: int, generate: Callable[[], Any]) -> list[float]:
    """MagCache's ratios for a model and a number of steps, from one dense generation.

    Args:
        transformer: The model.
        steps: Denoising steps.
        generate: Runs a generation of that many steps.

    Raises:
        RuntimeError: If diffusers logged no ratios.
    """
    from diffusers.hooks import MagCacheConfig

    lines: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("diffusers.hooks.mag_cache")
    listener, level = Listener(), logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.INFO)
    transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=steps))
    try:
        generate()
    finally:
        transformer.disable_cache()
        logger.removeHandler(listener)
        logger.setLevel(level)
    found = [m for line in lines for m in re.findall(r"\[[-\d., e]+\]", line)]
    if not found:
        raise RuntimeError("MagCache's calibration logged no ratios")
    return ast.literal_eval(found[0])
