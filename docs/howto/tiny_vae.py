"""A small AutoencoderKL on scikit-learn's digits: writes ``my-vae`` and ``photos``."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.datasets import load_digits

torch.manual_seed(0)
pixels = torch.tensor(load_digits().images / 16, dtype=torch.float32)
Path("photos").mkdir()
for number, digit in enumerate(pixels):
    Image.fromarray((digit * 255).byte().numpy()).save(f"photos/{number:04d}.png")

vae = AutoencoderKL(
    in_channels=1,
    out_channels=1,
    down_block_types=("DownEncoderBlock2D",) * 3,
    up_block_types=("UpDecoderBlock2D",) * 3,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    latent_channels=2,
    norm_num_groups=8,
    mid_block_add_attention=False,
    sample_size=8,
)
x = pixels[:, None] * 2 - 1
optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for _ in range(400):
    batch = x[torch.randint(len(x), (64,))]
    posterior = vae.encode(batch).latent_dist
    error = (vae.decode(posterior.sample()).sample - batch).square().sum((1, 2, 3))
    loss = (error / 0.2 + 0.1 * posterior.kl()).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
vae.save_pretrained("my-vae")
print(f"squared error a pixel {error.mean().item() / 64:.4f}")
