"""Images as they are stored, JPEG, PNG or whatever PIL reads, and data sets of them that are decoded when read."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image


class EncodedImage(NamedTuple):
    """An image as it is stored, JPEG, PNG or whatever PIL reads."""

    name: str  # for messages
    read: Callable[[], bytes]

    def open(self) -> Image.Image:
        """The image, its header read and the rest not yet; ValueError if it is none."""
        from PIL import Image

        try:
            return Image.open(io.BytesIO(self.read()))
        except Exception as error:  # PIL's decoders raise many kinds
            raise ValueError(self._complaint(error)) from error

    def readable(self) -> bool:
        """Whether `decode` can read it."""
        try:
            self.rgb()
        except ValueError:
            return False
        return True

    def decode(self, size: tuple[int, int]) -> Tensor:
        """uint8 [3, H, W]: RGB, the shorter side scaled and the centre cut out; ValueError if it cannot be read."""
        from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

        image = self.rgb()
        if image.size != size[::-1]:
            image = center_crop(resize(image, min(size)), list(size))
        return pil_to_tensor(image)

    def rgb(self) -> Image.Image:
        """The image as it is stored, uncut; ValueError if it cannot be read."""
        image = self.open()
        try:
            return _eight_bits(image).convert("RGB")
        except Exception as error:
            raise ValueError(self._complaint(error)) from error

    def _complaint(self, error: Exception) -> str:
        reason = "it is no image" if type(error).__name__ == "UnidentifiedImageError" else error
        return f"The image {self.name!r} cannot be read ({reason}); repair or remove it, or use on_bad_sample=skip."


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey levels of 16 bits divided by 256, where Pillow would clip them at 255.

    ValueError for other levels of more than 8 bits, since no file says what white is.
    """
    from PIL import Image

    if image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM"):  # PGM is brought to 16 bits
        image.load()  # which says what is wrong with a file, as NumPy does not
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its grey levels, Pillow's mode {image.mode}, have no known range; save it with 8 or 16 bits")
    return image


class DecodedWhenRead(ABC):
    """Images [N, 3, H, W] of files, decoded at every access."""

    size: tuple[int, int]
    shape: Sequence[int]

    @abstractmethod
    def file(self, index: int) -> EncodedImage: ...

    def __getitem__(self, indices: Sequence[int]) -> Tensor:
        return torch.stack([self.file(index).decode(self.size) for index in indices])

    def whole(self, indices: Sequence[int]) -> list[Image.Image]:
        """The whole images, RGB, each in its own size."""
        return [self.file(index).rgb() for index in indices]


class ListedImages(DecodedWhenRead):
    """Images of a list of files."""

    def __init__(self, files: Sequence[EncodedImage], size: tuple[int, int]) -> None:
        self.files, self.size = files, size
        self.shape = (len(files), 3, *size)

    def file(self, index: int) -> EncodedImage:
        return self.files[index]
