"""The density of embeddings: a score and its p-value for every row of an array."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import latentprior as lp

# Yours: embeddings, one a row; here eight principal components of digits. The last rows are replaced by noise.
embeddings = PCA(8, random_state=0).fit_transform(load_digits().data).astype(np.float32)
known, calibration, new = embeddings[:1200], embeddings[1200:1600], embeddings[1600:].copy()
new[-5:] = np.random.default_rng(0).normal(0, 20, (5, 8))

# The ten lines.
prior = lp.fit(known, max_stages=1)
with torch.no_grad():
    score = prior.log_prob(torch.as_tensor(new)).numpy()
    ordinary = np.sort(prior.log_prob(torch.as_tensor(calibration)).numpy())
# Conformal: how many rows that the prior never saw are as odd as this one, itself among them.
p = (1 + np.searchsorted(ordinary, score, side="right")) / (1 + len(ordinary))
check = prior.check_normalizer()
print(prior)
print(f"density integrates to {check.value:.3f} ± {check.stderr:.3f} (must be 1)")
print(f"mean log density {score[:-5].mean():.2f} nats, of the five noise rows {score[-5:].mean():.2f}")
print(f"p below 0.05: {(p[:-5] < 0.05).mean():.3f} of digits, {(p[-5:] < 0.05).mean():.3f} of noise")
