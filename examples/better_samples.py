"""Better samples from an autoencoder that you trained: its decoder at draws of the prior that its latents have."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import latentprior as lp
from latentprior.evaluation.metrics import two_sample_auc

# Yours: images, and an autoencoder trained on them.
torch.manual_seed(0)
x = torch.tensor(load_digits().data / 16, dtype=torch.float32)
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 6))
decoder = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
for _ in range(1500):
    batch = x[torch.randint(len(x), (128,))]
    loss = nn.functional.mse_loss(decoder(encoder(batch)), batch)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

# The ten lines.
with torch.no_grad():
    z = encoder(x)
    prior = lp.fit(z, max_stages=1)
    normal = torch.distributions.MultivariateNormal(z.mean(0), z.T.cov())
    before = decoder(normal.sample((1000,)))
    after = decoder(prior.sample((1000,), generator=torch.Generator().manual_seed(1)))
    reconstructions = decoder(z)
print(prior)
for name, samples in (("a normal of the latents' moments", before), ("the prior", after)):
    test = two_sample_auc(samples, reconstructions)
    print(f"trees tell samples of {name} from reconstructions with AUC {test.auc:.3f} ± {test.stderr:.3f} (best: 0.5)")
