"""Train the denoiser, and with it the text encoder at half the learning rate: captions -> latents of flat icons.

In: ``base/build/{icons/flat,vae,tokenizer}``.  Out: ``base/build/{unet,text_encoder,scheduler}`` (averages).
Run: ``python -m base.unet [--num-steps 6400]``; after a kill the same command resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from base.icons import caption, concepts, load_icon, pixel_values
from base.render import BUILD

BATCH = 32
LEARNING_RATE = 1e-3
TEXT_RATE = 0.5  # of the denoiser's
WARMUP = 200
EMA = 0.999
EMPTY_CAPTION = 0.1  # share of captions dropped, for classifier-free guidance
SAVE_EVERY = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=6400)
    parser.add_argument(
        "--decay-steps", type=int, default=3400, help="the last steps, over which the rate falls to zero"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer = CLIPTokenizer.from_pretrained(BUILD / "tokenizer")
    scheduler = noise_schedule()
    models: Any = torch.nn.ModuleDict({"unet": new_unet(), "text_encoder": new_text_encoder(tokenizer)}).to(args.device)
    average = copy.deepcopy(models).requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(models["unet"].parameters()), "lr": LEARNING_RATE},
            {"params": list(models["text_encoder"].parameters()), "lr": LEARNING_RATE * TEXT_RATE},
        ],
        weight_decay=0.01,
    )

    def rate(step: int) -> float:
        return min(1.0, (step + 1) / WARMUP, (args.num_steps - step) / args.decay_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    checkpoint = BUILD / "unet.ckpt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate, last_epoch=start - 1)
        print(f"resumed from step {start}")

    slugs = concepts()
    latents = encode(slugs)  # [N, 4, 16, 16], scaled
    ids = torch.stack([tokenize(tokenizer, [caption(s), caption(s, "flat"), ""]) for s in slugs])  # [N, 3, tokens]
    size = sum(p.numel() for p in models.parameters()) / 1e6
    print(f"{len(slugs)} concepts, {size:.2f} M parameters, steps {start}-{args.num_steps}")

    began, smoothed = time.monotonic(), None
    for step in range(start, args.num_steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        index = batch_index(step, len(slugs), args.seed)
        kind = torch.randint(2, (BATCH,), generator=generator)
        kind[torch.rand(BATCH, generator=generator) < EMPTY_CAPTION] = 2
        clean = latents[index].to(args.device)
        noise = torch.randn(clean.shape, generator=generator).to(args.device)
        timesteps = torch.randint(scheduler.config.num_train_timesteps, (BATCH,), generator=generator).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            hidden = models["text_encoder"](ids[index, kind].to(args.device)).last_hidden_state
            model_pred = models["unet"](scheduler.add_noise(clean, noise, timesteps), timesteps, hidden).sample
        # Uniform v-loss: min-SNR gives too little weight to high noise, where the text sets the shape.
        loss = F.mse_loss(model_pred.float(), scheduler.get_velocity(clean, noise, timesteps))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        decay = min(EMA, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - decay)

        smoothed = loss.item() if smoothed is None else 0.98 * smoothed + 0.02 * loss.item()
        if step % 50 == 0:
            print(f"step {step:5d}  loss {smoothed:.4f}  {time.monotonic() - began:6.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args.num_steps:
            state = {
                "models": models.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            }
            torch.save(state | {"step": step + 1}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    average.cpu()
    average["unet"].save_pretrained(BUILD / "unet")
    average["text_encoder"].save_pretrained(BUILD / "text_encoder")
    scheduler.save_pretrained(BUILD / "scheduler")


def noise_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        clip_sample=False,
        timestep_spacing="trailing",
        steps_offset=1,  # what StableDiffusionPipeline expects
    )


def new_unet() -> UNet2DConditionModel:
    """Return a new UNet of 8.9 M parameters. The plain attention processor is the fastest one in bf16 on a CPU at this
    size.
    """
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=192,
        attention_head_dim=(2, 4, 6),  # diffusers reads this as the number of heads
        norm_num_groups=16,
        use_linear_projection=True,
    )
    unet.set_attn_processor(AttnProcessor())
    return unet


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            projection_dim=192,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def tokenize(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(
        texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids


@torch.no_grad()
def encode(slugs: list[str]) -> torch.Tensor:
    """Return the scaled posterior means of the flat icons, float32 [N, 4, 16, 16]."""
    vae = AutoencoderKL.from_pretrained(BUILD / "vae").eval()
    images = pixel_values([load_icon("flat", slug) for slug in slugs])
    return torch.cat([vae.encode(p).latent_dist.mean for p in images.split(64)]) * vae.config.scaling_factor


def batch_index(step: int, num_items: int, seed: int) -> torch.Tensor:
    """Return the indices of one batch. Every epoch has another order, a function of (seed, step) alone."""
    position = torch.arange(step * BATCH, (step + 1) * BATCH)
    orders = {
        epoch: torch.randperm(num_items, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        for epoch in set((position // num_items).tolist())
    }
    return torch.stack([orders[int(p) // num_items][int(p) % num_items] for p in position])


if __name__ == "__main__":
    main()
