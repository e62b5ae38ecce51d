"""Memory and arithmetic of the stages, counted with fake tensors from the configs alone: no weight is read.

Frozen weights, adapter, gradients and optimizer state are exact. Activations are those of this device's kernels; what
kernels use inside, and the program itself (0.6 GB), come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lora_dag.adapters import lora
from lora_dag.adapters.adapter_set import AdapterSet, saved_name, text_configs
from lora_dag.adapters.params import LoraParams
from lora_dag.core import device as devices
from lora_dag.core.allocations import Allocations, materialize
from lora_dag.core.params import ModelParams
from lora_dag.diffusion.objectives import make_objective
from lora_dag.families import common
from stages.cache_latents.params import CacheParams
from stages.train import optimizers
from stages.train.averaging import AveragedWeights
from stages.train.batches import Batch
from stages.train.gradient_sum import GradientSum
from stages.train.loss import Loss
from stages.train.params import TrainParams
from stages.validate.params import ValidateParams

if TYPE_CHECKING:
    from lora_dag.core.params import Config
    from lora_dag.families.protocol import Family

Size = tuple[int, int]
"""Width and height in pixels."""


@dataclass(frozen=True)
class TrainStep:
    """Bytes of one process at the peak of a step, and the arithmetic of a step."""

    frozen: int
    """Frozen weights and buffers."""
    adapter: int
    gradients: int
    """Gradients, and their sum if they are accumulated."""
    state: int
    """State of the optimizer and averaged weights."""
    activations: int
    """Everything else that is alive at the peak."""
    flops: int
    """Floating-point operations of matrix products, convolutions and attention."""

    @property
    def peak(self) -> int:
        return self.frozen + self.adapter + self.gradients + self.state + self.activations


class Forecast:
    """Counts for a base model, whose folder needs only configs and tokenizers.

    Args:
        size: width and height of the largest images.
        num_tokens: tokens of the longest caption, for a denoiser that drops the padding.
        device: device whose kernels are counted; nothing is allocated on it.
    """

    def __init__(self, config: Config, family: Family, size: Size, num_tokens: int, device: torch.device) -> None:
        self.config, self.family, self.size, self.device = config, family, size, device
        self.num_tokens = num_tokens
        self.model = config.section(ModelParams)
        self.vae_model = self.model.model_copy(update={"dtype": family.vae_dtype(self.model)})

    def cache_latents(self) -> int:
        """Return the peak bytes: the larger one of the VAE and the text encoders, with their batches."""
        batch_size = self.config.section(CacheParams).batch_size
        with common.weightless() as built:
            vae = self.family.load_vae(self.vae_model, self.device, self.config.section(CacheParams).tiling)
        with FakeTensorMode(allow_non_fake_inputs=True), devices.autocast(self.device, self.vae_model):
            images = self._count(built, lambda: self.family.encode_images(vae, self._pixels(batch_size)))
        with common.weightless() as built:
            text = self.family.load_text(self.model, self.device)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), devices.autocast(self.device, self.model):
            captions = self._count(built, lambda: self.family.encode_prompts(text, [""] * batch_size))
        return max(images, captions)

    def entry_sizes(self) -> tuple[int, int]:
        """Return the bytes of a view's latents (mean and std, float32) and of a caption at full length in the cache."""
        with common.weightless() as built:
            vae, text = self.family.load_vae(self.model, self.device), self.family.load_text(self.model, self.device)
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in built:
                materialize(module, self.device)
            batch = self._batch(vae, text, 1)
        num_values = sum(value.numel() for value in batch.prompt.values())
        return 2 * batch.latents.nbytes, num_values * getattr(torch, self.model.dtype).itemsize

    def validate(self) -> int:
        """Return the peak bytes: of the text encoders, or of denoiser and VAE that draw and decode one image each."""
        settings = self.config.section(ValidateParams)
        batch_size = min(settings.batch_size, len(settings.prompts))
        limit = self.family.NO_GUIDANCE
        is_guided = limit is not None and settings.guidance_scale > limit
        with common.weightless() as built:
            text = self.family.load_text(self.model, self.device)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), devices.autocast(self.device, self.model):
            prompts = self._count(built, lambda: self.family.encode_prompts(text, [""] * batch_size))
        with common.weightless() as built:
            denoiser = self.family.load_denoiser(self.model, self.device)
            vae = self.family.load_vae(self.vae_model, self.device)
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            batch = self._batch(vae, text, max(settings.batch_size, batch_size * (2 if is_guided else 1)))

            def draw() -> None:
                with devices.autocast(self.device, self.model):
                    self.family.predict(denoiser, batch.latents, batch.timesteps, batch.prompt)
                with devices.autocast(self.device, self.vae_model):
                    self.family.decode_latents(vae, batch.latents[:1])

            return max(prompts, self._count(built, draw))

    def export(self) -> int:
        """Return the bytes of the text encoders in the frozen dtype or of the denoiser in float32, the larger one.

        A denoiser whose files are in half precision takes half as much.
        """
        exact = self.model.model_copy(update={"dtype": "float32", "quantization": None})
        with common.weightless() as encoders:
            self.family.load_text(self.model, self.device)
        with common.weightless() as denoiser:
            self.family.load_denoiser(exact, self.device)
        return max(
            sum(tensor.nbytes for each in built for tensor in each.parameters()) for built in (encoders, denoiser)
        )

    def train(self) -> TrainStep:
        """Return the counts of one optimizer step."""
        settings, params = self.config.section(LoraParams), self.config.section(TrainParams)
        family, model, device = self.family, self.model, self.device
        loss = Loss(make_objective(family.load_scheduler(model)), params)
        with common.weightless() as built:
            denoiser, vae = family.load_denoiser(model, device), family.load_vae(model, device)
            text = family.load_text(model, device)
        encoders = family.text_encoders(text) if settings.train_text_encoder else {}
        configs = text_configs(settings, family, encoders)
        adapter = AdapterSet(denoiser, lora.make_config(settings, denoiser), configs, encoders)
        if params.gradient_checkpointing:
            denoiser.enable_gradient_checkpointing()
        accumulation = params.gradient_accumulation_steps
        num_passes = min(2, accumulation)  # the others are like the second
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in built:
                materialize(module, device)
            trainable = {
                saved_name(component, name): parameter
                for component, module in adapter.modules.items()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad
            }
            batch = self._batch(vae, text, params.batch_size)
            counted = Allocations(self.num_tokens)
            modules = adapter.modules.values()
            tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
            frozen = counted.track(tensor for tensor in tensors if not tensor.requires_grad)
            num_adapter = counted.track(trainable.values())
            counted.track([batch.latents, batch.noise, batch.added_noise, *batch.prompt.values()])
            optimizer = optimizers.make_optimizer(params, trainable, {}, device)
            averaged = AveragedWeights(params, list(trainable.values()), optimizer)
            sums = GradientSum(trainable.values(), accumulation)
            with counted:
                for _ in range(num_passes):
                    with devices.autocast(device, model):
                        encoded = family.encode_prompts(text, batch.captions, batch.prompt) if encoders else {}
                        model_pred = family.predict(denoiser, batch.latents, batch.timesteps, batch.prompt | encoded)
                    loss(model_pred, batch).mean().backward()
                    del model_pred, encoded
                    sums.add()
                for parameter in trainable.values():  # sums.reduce reads values, which fake tensors do not have
                    parameter.grad = torch.empty_like(parameter)
                sums.clear()
                without_state = counted.live
                torch.nn.utils.clip_grad_norm_(list(trainable.values()), params.max_grad_norm)
                optimizer.step()
                averaged.step()
                num_state = counted.live - without_state
        # float32, as the adapter; a sum has int64 beside them
        num_gradients = num_adapter * (3 if accumulation > 1 else 1)
        return TrainStep(
            frozen=frozen,
            adapter=num_adapter,
            gradients=num_gradients,
            state=num_state,
            activations=max(0, counted.peak - frozen - num_adapter - num_gradients),
            flops=counted.flops * accumulation // num_passes,
        )

    def _count(self, built: list[torch.nn.Module], run: Any) -> int:
        """Return the peak bytes of modules and a function's tensors; call it with a mode of fake tensors."""
        for module in built:
            materialize(module, self.device)
        counted = Allocations(self.num_tokens)
        counted.track(tensor for module in built for tensor in (*module.parameters(), *module.buffers()))
        with counted:
            run()
        return counted.peak

    def _pixels(self, batch_size: int) -> torch.Tensor:
        width, height = self.size
        return torch.empty(batch_size, 3, height, width, device=self.device)

    def _batch(self, vae: Any, text: Any, batch_size: int) -> Batch:
        """Return a batch like those of the cache, of the largest images."""
        height, width = self.size[::-1]
        with torch.no_grad():
            latents, _ = self.family.encode_images(vae, self._pixels(1))  # [1, C, h, w]
            prompt = self.family.encode_prompts(text, [""])
        prompt |= {
            name: value[None]
            for name, value in self.family.view_conditioning((height, width), (0, 0), (height, width)).items()
        }

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(batch_size, *shape, device=self.device)

        return Batch(
            latents=empty(*latents.shape[1:]),
            noise=empty(*latents.shape[1:]),
            added_noise=empty(*latents.shape[1:]),
            timesteps=empty().long(),
            captions=[""] * batch_size,
            prompt={name: empty(*value.shape[1:]) for name, value in prompt.items()},
            weights=empty(),
            masks=None,
        )
