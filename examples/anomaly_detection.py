"""Anomaly detection: learn the density of normal rows, and call the least dense rows odd."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

import latentprior as lp
from latentprior.evaluation.metrics import average_precision

# Yours: normal rows to learn from, rows to judge. Here the digit 4 is the anomaly, and no 4 is learned from.
data, digit = load_digits(return_X_y=True)
normal, held_out = np.flatnonzero(digit != 4), np.arange(len(data)) % 3 == 0
train = normal[~held_out[normal]]
z = PCA(8, random_state=0).fit(data[train]).transform(data).astype(np.float32)

# The ten lines.
prior = lp.fit(z[train], max_stages=1)
with torch.no_grad():
    oddness = -prior.log_prob(torch.as_tensor(z[held_out])).numpy()
labels = digit[held_out] == 4
found = average_precision(labels, oddness)
print(prior)
print(f"average precision {found.auprc:.3f}; at random {found.prevalence:.3f}")
distance = NearestNeighbors(n_neighbors=5).fit(z[train]).kneighbors(z[held_out])[0][:, -1]
print(f"distance to the fifth neighbour, same rows: {average_precision(labels, distance).auprc:.3f}")
