"""Strangers from transformers, timm and torchvision: networks on images."""

from typing import Any

import torch
from torch import Tensor, nn

from strangers.entry import Stranger, stranger


def images(size: int = 16) -> list[Tensor]:
    return [torch.randn(1, 3, size, size) for _ in range(4)]


def pair_of_images(size: int = 16) -> list[Tensor]:
    """Return poses of two images: a normalisation in training needs more than one value per channel."""
    return [torch.randn(2, 3, size, size) for _ in range(4)]


def first_output(model: nn.Module, pose: Tensor) -> Tensor:
    output: Any = model(pose)
    return (output if isinstance(output, Tensor) else output.logits)[:, 0].mean(0, keepdim=True)


def _transformers() -> Any:
    import transformers  # noqa: PLC0415 - optional

    return transformers


@stranger("transformers")
def vit() -> Stranger:
    library = _transformers()
    config = library.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=1,
    )
    return Stranger(library.ViTForImageClassification(config).train(), images(), first_output)


@stranger("transformers")
def swin() -> Stranger:
    library = _transformers()
    config = library.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=2, num_labels=1
    )
    return Stranger(library.SwinForImageClassification(config).train(), images(), first_output)


@stranger("transformers")
def efficientnet() -> Stranger:
    """Normalisation in training, with a momentum, and layers that are dropped at random."""
    library = _transformers()
    config = library.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        in_channels=[32, 16],
        out_channels=[16, 24],
        kernel_sizes=[3, 3],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 6],
        depthwise_padding=[],
        num_labels=1,
    )
    return Stranger(library.EfficientNetForImageClassification(config).train(), pair_of_images(32), first_output)


@stranger("transformers")
def resnet() -> Stranger:
    library = _transformers()
    config = library.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=1
    )
    return Stranger(library.ResNetForImageClassification(config).train(), pair_of_images(), first_output)


@stranger("transformers")
def convnext() -> Stranger:
    library = _transformers()
    config = library.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, drop_path_rate=0.3, num_labels=1)
    return Stranger(library.ConvNextForImageClassification(config).train(), images(), first_output)


def _timm(name: str, **options: Any) -> Stranger:
    import timm  # noqa: PLC0415 - optional

    return Stranger(timm.create_model(name, num_classes=1, **options).train(), pair_of_images(32), first_output)


@stranger("timm")
def efficientnet_of_timm() -> Stranger:
    return _timm("test_efficientnet", drop_path_rate=0.2)


@stranger("timm")
def vit_of_timm() -> Stranger:
    return _timm("test_vit", img_size=32, drop_path_rate=0.2)


@stranger("torchvision")
def densenet_of_torchvision() -> Stranger:
    """With checkpoints inside, which run a normalisation twice."""
    from torchvision.models import DenseNet  # noqa: PLC0415 - optional

    model = DenseNet(4, (2, 2), 8, num_classes=1, drop_rate=0.1, memory_efficient=True)
    return Stranger(model.train(), pair_of_images(32), first_output)
