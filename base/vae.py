"""Train the autoencoder: pixels [-1, 1] of 64x64 -> latents 4x16x16.

In: ``base/build/icons/{flat,noto}``.  Out: ``base/build/vae`` (float32).
Run: ``python -m base.vae [--num-steps 2000]``; after a kill the same command resumes from the last checkpoint.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from base.icons import load_icon, pixel_values
from base.render import BUILD

STYLES = ("flat", "noto")  # the held-out "ink" style is never seen
BATCH = 16
LEARNING_RATE = 2e-3
SAVE_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    vae = AutoencoderKL(
        block_out_channels=(16, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(args.device)
    icons = [(style, p.stem) for style in STYLES for p in sorted((BUILD / "icons" / style).glob("*.png"))]
    images = pixel_values([load_icon(*icon) for icon in icons])
    large = torch.stack([torch.from_numpy(np.array(load_icon(*icon, 128).convert("L")))[None] for icon in icons])
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=args.num_steps, pct_start=0.05)
    checkpoint = BUILD / "vae.ckpt"
    start = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        start = state["step"]
        print(f"resumed from step {start}")

    began = time.monotonic()
    for step in range(start, args.num_steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        pixels = augment(images, large, generator).to(args.device)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = reconstruction_loss(decoded.float(), pixels) + 3e-4 * kl
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"step {step:5d}  loss {loss.item():.4f}  {time.monotonic() - began:6.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0:
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state | {"schedule": schedule.state_dict(), "step": step + 1}, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    vae.eval()
    vae.register_to_config(scaling_factor=round(1 / latent_std(vae, images), 4))
    vae.save_pretrained(BUILD / "vae")
    ink = pixel_values([load_icon("ink", p.stem) for p in sorted((BUILD / "icons" / "ink").glob("*.png"))[::8]])
    print(f"scaling factor {vae.config.scaling_factor}")
    print(f"PSNR  seen styles {psnr(vae, images[::16]):.1f} dB   ink (never seen) {psnr(vae, ink):.1f} dB")


def augment(images: torch.Tensor, large: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw a batch [BATCH, 3, 64, 64]: shifted and mirrored images, two fifths of them turned into line art.

    Line art is thresholded on luminance of twice the size, then halved: black on white with the soft edges of an icon,
    so that a black-and-white style that was never seen is reconstructed too.

    Args:
        images: [N, 3, 64, 64] in [-1, 1].
        large: luminance of the same images, uint8 [N, 1, 128, 128].
    """
    index = torch.randint(len(images), (BATCH,), generator=generator)
    color = images[index]
    gray = large[index].float() / 127.5 - 1
    contrast = F.max_pool2d(gray, 3, 1, 1) + F.max_pool2d(-gray, 3, 1, 1)
    lines = (contrast > 0.35).float()
    width = 2 * int(torch.randint(1, 4, (1,), generator=generator)) - 1
    outline = F.max_pool2d(lines, width, 1, width // 2)
    solid = (gray < 0.5 * torch.rand(BATCH, 1, 1, 1, generator=generator)).float()
    both = (solid - outline).abs()  # white lines inside black shapes
    kind = torch.rand(BATCH, 1, 1, 1, generator=generator)
    for low, high, art in ((0.0, 0.14, outline), (0.14, 0.28, solid), (0.28, 0.42, both)):
        color = torch.where((kind >= low) & (kind < high), 1 - 2 * F.avg_pool2d(art, 2), color)
    flip = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
    color = torch.where(flip, color.flip(-1), color)
    dy, dx = torch.randint(-4, 5, (2,), generator=generator).tolist()
    return color.roll((dy, dx), (-2, -1))


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """Return L1 + 0.5 gradient + 0.5 MSE. The gradient term keeps lines sharp."""
    dx = (decoded.diff(dim=-1) - pixels.diff(dim=-1)).abs().mean()
    dy = (decoded.diff(dim=-2) - pixels.diff(dim=-2)).abs().mean()
    return F.l1_loss(decoded, pixels) + 0.5 * (dx + dy) + 0.5 * F.mse_loss(decoded, pixels)


@torch.no_grad()
def latent_std(vae: AutoencoderKL, images: torch.Tensor) -> float:
    return (
        torch.cat([vae.encode(p.to(vae.device)).latent_dist.sample().cpu() for p in images[::8].split(64)]).std().item()
    )


@torch.no_grad()
def psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Return the mean PSNR in dB of the reconstructions from posterior means, for pixels of range 2."""
    out = torch.cat([vae.decode(vae.encode(p.to(vae.device)).latent_dist.mean).sample.cpu() for p in images.split(64)])
    return (10 * torch.log10(4 / ((out - images) ** 2).flatten(1).mean(1))).mean().item()


if __name__ == "__main__":
    main()
