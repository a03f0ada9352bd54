"""Augmentation of training images with timm's parts: crops, RandAugment, random erasing, mixup, cutmix, repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from formix.data.base import Batch, Data
from formix.data.draws import DrawnDataset, own_randomness, seed_all
from formix.data.images import ImageDataset

POLICIES = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How training images are varied; the defaults vary nothing. Validation and test images are never touched."""

    # smallest share of the image's area that a random resized crop keeps (ImageNet: 0.08); 1: off. It is of the image
    # as it is stored, before scaling and cutting to the size trained on; crops of files are decoded at every access
    crop: float = 1.0
    shift: int = 0  # random crop of the image with so many pixels of zeros around it (CIFAR: 4); instead of `crop`
    flip: float = 0.0  # probability of a horizontal flip
    policy: str | None = None  # timm's name of an auto-augment policy: "rand-m9-mstd0.5-inc1" is DeiT's RandAugment
    color_jitter: float = 0.0  # brightness, contrast and saturation, 1 +- this; without effect under a policy
    erasing: float = 0.0  # probability that a random rectangle becomes noise
    mixup: float = 0.0  # alpha of the Beta distribution that mixes two images and their labels; 0: off
    cutmix: float = 0.0  # the same for pasting a rectangle of another image; with both, each batch gets one of them
    mix_probability: float = 1.0  # share of batches that mixup and cutmix apply to
    repeats: int = 1  # differently augmented copies of an image in an epoch, whose length stays (DeiT: 3)
    interpolation: str = "bicubic"  # of crops and of RandAugment: bilinear, bicubic or random

    def __post_init__(self) -> None:
        for name in ("flip", "erasing", "mix_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"augmentation: {name} is {getattr(self, name)}; a probability is 0 to 1.")
        if not 0 < self.crop <= 1:
            raise ValueError(f"augmentation: crop is {self.crop}; it must be above 0 and at most 1.")
        for name in ("shift", "color_jitter", "mixup", "cutmix"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"augmentation: {name} is {getattr(self, name)}; it must be finite and 0 or more.")
        if self.shift and self.crop < 1:
            raise ValueError(f"augmentation: shift is {self.shift} and crop {self.crop}; use one of the two crops.")
        if self.repeats < 1:
            raise ValueError(f"augmentation: repeats is {self.repeats}; it must be 1 or more.")
        if self.interpolation not in ("bilinear", "bicubic", "random"):
            raise ValueError(
                f"augmentation: interpolation is {self.interpolation!r}; it must be bilinear, bicubic or random."
            )
        if self.policy is not None and self.policy.partition("-")[0] not in POLICIES:
            raise ValueError(
                f"augmentation: policy is {self.policy!r}; timm's policies begin with {', '.join(POLICIES)}, such as "
                "'rand-m9-mstd0.5-inc1'."
            )

    @property
    def mixes(self) -> bool:
        """Whether labels become distributions over the classes."""
        return self.mixup > 0 or self.cutmix > 0


def augmented(data: Data, augmentation: Augmentation, seed: int) -> Data:
    """`data` with its training images augmented.

    With mixup or cutmix the labels of training batches are float32 [B, classes].

    Raises:
        ValueError: data without images, or a policy that timm does not know.
    """
    if augmentation == Augmentation():
        return data
    if data.task != "image-classification":
        raise ValueError(f"augmentation is for images, and {data.name!r} is {data.task}; leave it out.")
    assert isinstance(data.train, ImageDataset)
    assert data.num_classes is not None
    train = AugmentedImages(data.train, augmentation, num_classes=data.num_classes, seed=seed)
    provenance = {**data.provenance, "augmentation": dataclasses.asdict(augmentation)}
    return dataclasses.replace(data, train=train, provenance=provenance)


class AugmentedImages(DrawnDataset):
    """An `ImageDataset` whose images are augmented one by one and then mixed batch by batch.

    An image's randomness derives from (seed, sample, draw), a batch's from (seed, first index). Mixing pairs image b of
    a batch with image B - 1 - b; the middle one of an odd batch stays as it is. The batch is what is asked for at once:
    in training, a process's part of a step.
    """

    def __init__(self, images: ImageDataset, augmentation: Augmentation, *, num_classes: int, seed: int) -> None:
        self.images, self.seed, self.repeats = images, seed, augmentation.repeats
        self.transform = _transform(images, augmentation)
        self.crops = augmentation.crop < 1
        self.num_classes = num_classes
        self.mix = _mixer(augmentation, num_classes) if augmentation.mixes else None

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        from torchvision.transforms.functional import to_pil_image

        draws = self.draws(indices)
        samples = [sample for sample, _ in draws]
        uncut, labels = self.images.uncut, self.images.labels[samples]  # [B]
        if self.crops and uncut is not None:
            images = uncut.whole(samples)  # which the crop brings to the size of the others
        else:
            images = [to_pil_image(image) for image in self.images.pixels[samples]]
        with own_randomness():
            varied = []
            for image, (sample, draw) in zip(images, draws, strict=True):
                seed_all(self.seed, sample, draw)
                varied.append(self.transform(image))
            batch = torch.stack(varied)  # float32 [B, C, H, W], normalised
            if self.mix is not None:
                seed_all(self.seed, int(indices[0]), len(self))  # where an image has its draw, which seldom gets there
                batch, labels = self._mixed(batch, labels)
        return {"pixel_values": batch, "labels": labels}

    def _mixed(self, batch: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        assert self.mix is not None
        size = len(labels)
        if size % 2 == 0:
            return self.mix(batch, labels)
        half = size // 2
        rows = [*range(half), *range(half + 1, size)]
        whole = torch.nn.functional.one_hot(labels, self.num_classes).float()  # [B, classes]
        if rows:
            batch[rows], whole[rows] = self.mix(batch[rows], labels[rows])
        return batch, whole


def _transform(images: ImageDataset, augmentation: Augmentation) -> Callable[[Any], Tensor]:
    """PIL image -> normalised float32 [C, H, W]."""
    from timm.data import create_transform
    from torchvision.transforms import Compose, RandomCrop

    _, channels, height, width = images.pixels.shape
    std = 1 / images.scale.flatten()  # [C], of pixels 0 to 255
    mean = -images.shift.flatten() * std
    try:
        transform: Any = create_transform(
            (channels, height, width),
            is_training=True,
            scale=(augmentation.crop, 1.0),
            ratio=(3 / 4, 4 / 3) if augmentation.crop < 1 else (1.0, 1.0),
            hflip=augmentation.flip,
            color_jitter=augmentation.color_jitter or None,  # type: ignore[arg-type]
            auto_augment=augmentation.policy,
            interpolation=augmentation.interpolation,
            mean=tuple((mean / 255).tolist()),
            std=tuple((std / 255).tolist()),
            re_prob=augmentation.erasing,
            re_mode="pixel",
        )
    except (AssertionError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"augmentation: timm cannot make the policy {augmentation.policy!r}: {error}") from None
    steps = transform.transforms
    _posterize_to_black(steps)
    if augmentation.crop == 1:
        steps = steps[1:]  # timm always begins with a random resized crop
    if augmentation.shift:
        steps = [RandomCrop((height, width), padding=augmentation.shift), *steps]
    return Compose(steps)


def _posterize_to_black(steps: Sequence[Any]) -> None:
    """At their greatest magnitude timm's policies keep 0 bits of a picture, which Pillow refuses from version 13 on;
    before, the picture became black, and here it still does."""
    from timm.data import auto_augment

    def posterize(image: Any, bits: int, **options: Any) -> Any:
        return auto_augment.posterize(image, bits, **options) if bits else image.point(lambda _: 0)

    def operations(part: Any) -> Iterator[Any]:
        if isinstance(part, auto_augment.AugmentOp):
            yield part
        for inner in part if isinstance(part, list) else [*getattr(part, "ops", ()), *getattr(part, "policy", ())]:
            yield from operations(inner)

    for operation in operations(list(steps)):
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = posterize


def _mixer(augmentation: Augmentation, num_classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    from timm.data import Mixup

    return Mixup(
        mixup_alpha=augmentation.mixup,
        cutmix_alpha=augmentation.cutmix,
        prob=augmentation.mix_probability,
        label_smoothing=0.0,  # the loss smooths
        num_classes=num_classes,
    )
