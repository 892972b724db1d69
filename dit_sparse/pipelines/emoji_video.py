"""Text-to-video pipeline of the model that ships with dit-sparse.

The denoiser is a stock `WanTransformer3DModel` and the loop is that of `WanPipeline`, so everything
that works on Wan (attention processors, cache hooks, CPU offload) works here without special cases.
"""

# Annotations are not postponed: older versions of diffusers read the components' classes from
# those of __init__.
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import diffusers
import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor

from dit_sparse.pipelines.codec import PatchCodec
from dit_sparse.pipelines.text_encoder import CaptionEncoder
from dit_sparse.processors.hooks import tells_steps

OUTPUT_TYPES = ("np", "pil", "pt", "latent")


@dataclass
class EmojiVideoPipelineOutput(BaseOutput):
    """Output of `EmojiVideoPipeline`.

    Attributes:
        frames: "np": float32 [B, F, H, W, 3] in 0..1; "pt": float32 [B, F, 3, H, W] in 0..1;
            "pil": list of lists of images; "latent": latents [B, 48, F / 2, H / 8, W / 8].
    """

    frames: np.ndarray | torch.Tensor | list[list[PIL.Image.Image]]


class EmojiVideoPipeline(DiffusionPipeline):
    """Generates short clips of emoji sprites from a caption.

    Args:
        transformer: The denoiser, predicting the velocity `noise - x0`.
        scheduler: Flow-matching Euler scheduler.
        codec: Video codec of the latents.
        text_encoder: Caption encoder.
    """

    model_cpu_offload_seq = "text_encoder->transformer->codec"
    _callback_tensor_inputs: ClassVar[list[str]] = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
    ]

    def __init__(
        self,
        transformer: WanTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
        codec: PatchCodec,
        text_encoder: CaptionEncoder,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer, scheduler=scheduler, codec=codec, text_encoder=text_encoder
        )
        self.video_processor = VideoProcessor(vae_scale_factor=8)
        self._guidance_scale = 1.0
        self._num_timesteps = 0
        self._current_timestep: torch.Tensor | None = None
        self._interrupt = False
        self._told_words: set[str] = set()

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running or the last call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running or the last call makes a second, unconditional prediction."""
        return self._guidance_scale > 1.0

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the running or the last call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep being denoised, None outside of a call."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to skip the remaining steps."""
        return self._interrupt

    def check_inputs(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None,
        height: int,
        width: int,
        num_frames: int,
        num_inference_steps: int,
        num_videos_per_prompt: int,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        callback_on_step_end_tensor_inputs: list[str],
    ) -> tuple[list[str], list[str]]:
        """Validates the arguments of a call, and warns once of a word that the model does not know.

        Returns:
            The prompts and the negative prompts, as lists of the same length.

        Raises:
            ValueError: Names the first argument that cannot work, and what to pass instead.
        """
        prompts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(prompts, (list, tuple)) or not prompts:
            raise ValueError(
                "expected prompt to be a string or a non-empty list of strings, "
                f"got {prompt!r}; pass for example 'a red heart moving right'"
            )
        negatives = "" if negative_prompt is None else negative_prompt
        negatives = [negatives] * len(prompts) if isinstance(negatives, str) else negatives
        if not isinstance(negatives, (list, tuple)) or len(negatives) != len(prompts):
            count = len(negatives) if isinstance(negatives, (list, tuple)) else negatives
            raise ValueError(
                f"expected negative_prompt to be one string or {len(prompts)} strings (one per "
                f"prompt), got {count!r}; pass None for the unconditional caption"
            )
        unknown_words: dict[str, None] = {}
        for text in (*prompts, *negatives):
            self.text_encoder.tokenize(text)
            unknown_words |= dict.fromkeys(self.text_encoder.unknown_words(text))
        for name, value in (
            ("height", height),
            ("width", width),
            ("num_frames", num_frames),
            ("num_inference_steps", num_inference_steps),
            ("num_videos_per_prompt", num_videos_per_prompt),
        ):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(
                    f"expected {name} to be a positive integer, got {value!r}; pass an int >= 1"
                )
        latent_size = self.codec.latent_shape(num_frames, height, width)
        batch = len(prompts) * num_videos_per_prompt
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"expected one generator or a list of {batch} (prompts times videos per prompt), "
                f"got a list of {len(generator)}; pass one generator for the whole batch"
            )
        expected_shape = (batch, self.transformer.config.in_channels, *latent_size)
        if latents is not None and tuple(latents.shape) != expected_shape:
            raise ValueError(
                f"expected latents of shape {list(expected_shape)}, got {list(latents.shape)}; "
                "match them to prompt, num_videos_per_prompt, num_frames, height and width"
            )
        if output_type not in OUTPUT_TYPES:
            raise ValueError(
                f"expected output_type to be one of {list(OUTPUT_TYPES)}, got {output_type!r}; "
                "use 'np' for arrays in 0..1"
            )
        unknown = set(callback_on_step_end_tensor_inputs or ()) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                "expected callback_on_step_end_tensor_inputs to be names out of "
                f"{self._callback_tensor_inputs}, got {sorted(unknown)}; remove these names"
            )
        if new := [word for word in unknown_words if word not in self._told_words]:
            self._told_words.update(new)
            # Out of this method, of __call__ and of no_grad around it.
            warnings.warn(
                f"this model was never trained on {', '.join(map(repr, new))}, which it cannot "
                f"show; {self.text_encoder.known_words(new)}",
                stacklevel=4,
            )
        return list(prompts), list(negatives)

    def encode_prompt(
        self, prompts: list[str], num_videos_per_prompt: int = 1, device: Any = None
    ) -> torch.Tensor:
        """Embeddings [B * num_videos_per_prompt, L, D] of captions, in the transformer's dtype."""
        device = device or self._execution_device
        # Through the module call, not through encode(), so that CPU offload hooks run.
        embeds = self.text_encoder(self.text_encoder.tokenize_batch(prompts).to(device))
        return embeds.to(self.transformer.dtype).repeat_interleave(num_videos_per_prompt, dim=0)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        height: int = 128,
        width: int = 128,
        num_frames: int = 16,
        num_inference_steps: int = 30,
        guidance_scale: float = 3.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
    ) -> EmojiVideoPipelineOutput | tuple:
        """Generates videos.

        Args:
            prompt: One caption or a list of captions, in words of `text_encoder.config.words`.
                The empty one is unconditional.
            negative_prompt: Caption to steer away from; None is the unconditional caption.
            height: Multiple of 8.
            width: Multiple of 8.
            num_frames: Even number.
            num_inference_steps: Euler steps.
            guidance_scale: Classifier-free guidance; at 1 or below, one prediction per step.
            num_videos_per_prompt: Videos per caption.
            generator: One generator, or one per video.
            latents: Initial noise [B, 48, F / 2, H / 8, W / 8] instead of a random draw.
            output_type: "np", "pil", "pt" or "latent".
            return_dict: Return an `EmojiVideoPipelineOutput` instead of a tuple.
            callback_on_step_end: `callback(pipe, step, timestep, tensors) -> tensors`.
            callback_on_step_end_tensor_inputs: Names of the tensors the callback gets.

        Returns:
            The frames, see `EmojiVideoPipelineOutput`.
        """
        prompts, negatives = self.check_inputs(
            prompt,
            negative_prompt,
            height,
            width,
            num_frames,
            num_inference_steps,
            num_videos_per_prompt,
            generator,
            latents,
            output_type,
            list(callback_on_step_end_tensor_inputs or ()),
        )
        self._guidance_scale = guidance_scale
        self._current_timestep = None
        self._interrupt = False
        device = self._execution_device
        transformer_dtype = self.transformer.dtype

        prompt_embeds = self.encode_prompt(prompts, num_videos_per_prompt, device)
        negative_prompt_embeds = None
        if self.do_classifier_free_guidance:
            negative_prompt_embeds = self.encode_prompt(negatives, num_videos_per_prompt, device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = self.scheduler.timesteps
        self._num_timesteps = len(timesteps)
        # A known first index spares the scheduler a device-to-host look-up.
        self.scheduler.set_begin_index(0)
        # Read once: a float() of a device tensor in every step would stall the queue.
        sigmas = self.scheduler.sigmas.tolist()

        shape = (
            len(prompts) * num_videos_per_prompt,
            self.transformer.config.in_channels,
            *self.codec.latent_shape(num_frames, height, width),
        )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        else:
            latents = latents.to(device=device, dtype=torch.float32)

        with self.progress_bar(total=num_inference_steps) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = t
                latent_model_input = latents.to(transformer_dtype)
                timestep = t.expand(latents.shape[0])
                step_fields: dict[str, Any] = {}
                if tells_steps(self.transformer):
                    step_fields = {
                        "step_index": i,
                        "sigma": sigmas[i],
                        "num_inference_steps": self._num_timesteps,
                    }
                with self.transformer.cache_context("cond", **step_fields):
                    noise_pred = self.transformer(
                        hidden_states=latent_model_input,
                        timestep=timestep,
                        encoder_hidden_states=prompt_embeds,
                        return_dict=False,
                    )[0]
                if self.do_classifier_free_guidance:
                    with self.transformer.cache_context("uncond", **step_fields):
                        noise_uncond = self.transformer(
                            hidden_states=latent_model_input,
                            timestep=timestep,
                            encoder_hidden_states=negative_prompt_embeds,
                            return_dict=False,
                        )[0]
                    noise_pred = noise_uncond + guidance_scale * (noise_pred - noise_uncond)

                latents = self.scheduler.step(noise_pred, t, latents, return_dict=False)[0]

                if callback_on_step_end is not None:
                    tensors = {
                        "latents": latents,
                        "prompt_embeds": prompt_embeds,
                        "negative_prompt_embeds": negative_prompt_embeds,
                    }
                    names = callback_on_step_end_tensor_inputs or ()
                    outputs = callback_on_step_end(self, i, t, {k: tensors[k] for k in names}) or {}
                    latents = outputs.get("latents", latents)
                    prompt_embeds = outputs.get("prompt_embeds", prompt_embeds)
                    negative_prompt_embeds = outputs.get(
                        "negative_prompt_embeds", negative_prompt_embeds
                    )
                progress_bar.update()

        self._current_timestep = None
        if output_type == "latent":
            frames = latents
        else:
            video = self.codec.decode(latents.to(self.codec.dtype)).float()
            frames = self.video_processor.postprocess_video(video, output_type=output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return (frames,)
        return EmojiVideoPipelineOutput(frames=frames)


# `DiffusionPipeline.from_pretrained(folder)` looks the class in model_index.json up by attribute on
# the diffusers package. Registering it there makes the generic loader work once this module has
# been imported; the components are saved under their full module names and resolve by themselves.
if not hasattr(diffusers, EmojiVideoPipeline.__name__):
    setattr(diffusers, EmojiVideoPipeline.__name__, EmojiVideoPipeline)
