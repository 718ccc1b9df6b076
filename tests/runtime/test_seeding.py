import torch

from latentprior.runtime.seeding import derived_generator, device_of

CPU = torch.device("cpu")


def test_the_same_keys_draw_the_same_numbers() -> None:
    drawn = [
        torch.randn(5, generator=derived_generator(CPU, *keys)) for keys in ((1, "a"), (1, "a"), (1, "b"), (2, "a"))
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0], drawn[3])


def test_a_generator_draws_on_its_device() -> None:
    assert device_of(None) == CPU
    assert device_of(torch.Generator("cpu")) == CPU
