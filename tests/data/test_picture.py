"""One picture in every form, whole or its centre."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from multiway.data.image import View
from multiway.data.picture import whole_picture
from multiway.errors import ConfigError
from tests.data.raw import encode, noise


@pytest.mark.parametrize(("px", "share"), [(12, None), ((8, 16), None), (12, 0.875), ((8, 16), 1.0)])
def test_every_form_gives_the_same_pixels(tmp_path: Path, px: int | tuple[int, int], share: float | None) -> None:
    picture = noise(50, 40)
    tensor = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    path = tmp_path / "picture.png"
    path.write_bytes(encode(picture))
    expected = View(px=px, share=share)(tensor)
    for form in (path, str(path), path.read_bytes(), picture, tensor):
        assert torch.equal(whole_picture(form, px, share), expected)


def test_the_centre_is_not_the_squeezed_whole() -> None:
    picture = noise(80, 40)
    assert not torch.equal(whole_picture(picture, 16, 1.0), whole_picture(picture, 16))


def test_a_share_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigError, match="share"):
        whole_picture(noise(), 16, 2.0)
