import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from latentprior.storage.pictures import data_uri, image_grid, picture_grid, png


def read(blob):
    with Image.open(io.BytesIO(blob)) as picture:
        return np.array(picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_pictures_are_what_another_reader_sees(channels, generator):
    x = torch.rand(5, channels, 4, 3, generator=generator) * 2 - 1
    uri = data_uri(png(image_grid(x, columns=3, gap=1, transparent=True)))
    kind, _, data = uri.partition(",")
    assert kind == "data:image/png;base64"
    pixels = read(base64.b64decode(data))
    assert pixels.shape == (2 * 5 - 1, 3 * 4 - 1, 4)
    expected = ((x + 1) * 127.5).round().byte().expand(5, 3, 4, 3).permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(pixels[5:9, 4:7, :3], expected[4])
    np.testing.assert_array_equal(pixels[:4, 8:11, :3], expected[2])
    # Between the pictures, and where there is none, the page shows through.
    assert (pixels[4, :, 3] == 0).all()
    assert (pixels[5:9, 8:11, 3] == 0).all()
    assert (pixels[:4, :3, 3] == 255).all()


@pytest.mark.parametrize(("channels", "shape"), [(1, ()), (2, ()), (3, (3,)), (4, (3,))])
def test_grids_are_square_with_white_lines(channels, shape):
    pixels = read(picture_grid(-torch.ones(7, channels, 2, 2)))
    assert pixels.shape == (3 * 4 - 2, 3 * 4 - 2, *shape)
    assert (pixels[:2, :2] == 0).all()
    assert (pixels[2:4] == 255).all()
    assert (pixels[8:, 4:] == 255).all()
