import pytest
import torch
from torch import nn

from latentprior.runtime.moving_average import MovingAverage


@pytest.mark.parametrize("count", [0, 1])
def test_the_average_follows_its_formula(count: int) -> None:
    network = nn.Module()
    network.weight = nn.Parameter(torch.ones(1, 2))
    average, wanted = MovingAverage(network, 0.2, count), 1.0
    for i in range(1 + count, 6 + count):
        with torch.no_grad():
            network.weight.fill_(float(i))
        average.update(network)
        decay = min(0.2, i / (i + 9))
        wanted = decay * wanted + (1 - decay) * i
    assert average.count == 5 + count
    assert average.weights["weight"][0].tolist() == pytest.approx([wanted, wanted])
    average.copy_to(network)
    assert network.weight[0].tolist() == pytest.approx([wanted, wanted])
