"""The network of the embedded data: three residual blocks, small enough to train within a minute on one core.

Beside it, to see what a method owes to its shape: a deeper one, and one without skip connections.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from neuronsurgery.study.data import uniforms

Network = TypeVar("Network", bound=nn.Module)


class Block(nn.Module):
    """A basic residual block: relu(shortcut(x) + norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(outputs)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, outputs, H / stride, W / stride) of x (B, inputs, H, W)."""
        branch = functional.relu(self.norm1(self.conv1(x)))
        branch = self.norm2(self.conv2(branch))
        return functional.relu(self.shortcut(x) + branch)


class SmallResNet(nn.Module):
    """A residual network of 16, 32 and 64 channels for RGB images of any size.

    The stem halves the image, and so do blocks 2 and 3: without the stem's stride, training takes four times as long.
    77,522 parameters for two classes; 336 convolution channels, and one row of the head per class, in ten layers.
    """

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(16)
        self.block1 = Block(16, 16, stride=1)
        self.block2 = Block(16, 32, stride=2)
        self.block3 = Block(32, 64, stride=2)
        self.head = nn.Linear(64, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of images (B, 3, H, W) in [0, 1]."""
        x = functional.relu(self.stem_norm(self.stem(images)))
        x = self.block3(self.block2(self.block1(x)))
        return self.head(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any


def small_resnet(seed: int = 0, classes: int = 2) -> SmallResNet:
    """A freshly initialised `SmallResNet` in training mode, the same for a seed on any machine.

    Weights of convolutions and of the head are uniform within +-1 / sqrt(inputs of a neuron), as torch draws them;
    biases are 0, norms the identity. The global random state is left alone. Weights are laid out channels last, which
    on a CPU makes training a quarter faster and is no matter to whoever reads them.

    Args:
        seed: of the weights.
        classes: the number of logits.

    Returns:
        The network, float32, on the CPU.
    """
    with torch.random.fork_rng(devices=[]):  # the constructors of torch draw from the global state
        network = SmallResNet(classes)
    return _initialised(network, "small_resnet", seed)


class PlainBlock(nn.Sequential):
    """The layers of a `Block` without the path beside them: relu(norm2(conv2(relu(norm1(conv1(x))))))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            OrderedDict(
                conv1=nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                norm1=nn.BatchNorm2d(outputs),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                norm2=nn.BatchNorm2d(outputs),
                relu2=nn.ReLU(),
            )
        )


def deep_resnet(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """A freshly initialised `SmallResNet` of twice as many blocks, two in each stage; as `small_resnet` otherwise.

    Args:
        seed: of the weights.
        classes: the number of logits.

    Returns:
        The network, float32, on the CPU, 174,738 parameters for two classes: "stem" and "stem_norm", "block1" to
        "block6", "head".
    """
    with torch.random.fork_rng(devices=[]):
        shapes = ((16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1))
        network = _chain([Block(*shape) for shape in shapes], classes)
    return _initialised(network, "deep_resnet", seed)


def plain_cnn(seed: int = 0, classes: int = 2) -> nn.Sequential:
    """A freshly initialised network of the convolutions of a `SmallResNet` without its skip connections.

    Args:
        seed: of the weights.
        classes: the number of logits.

    Returns:
        The network, float32, on the CPU, 74,770 parameters for two classes: "stem" and "stem_norm", "block1" to
        "block3", "head".
    """
    with torch.random.fork_rng(devices=[]):
        network = _chain([PlainBlock(*shape) for shape in ((16, 16, 1), (16, 32, 2), (32, 64, 2))], classes)
    return _initialised(network, "plain_cnn", seed)


def _chain(blocks: Sequence[nn.Module], classes: int) -> nn.Sequential:
    """The stem of a `SmallResNet`, blocks that end in 64 channels, and its head."""
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        stem=nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False), stem_norm=nn.BatchNorm2d(16), stem_relu=nn.ReLU()
    )
    layers |= {f"block{number}": block for number, block in enumerate(blocks, start=1)}
    layers |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "head": nn.Linear(64, classes)}
    return nn.Sequential(layers)


def _initialised(network: Network, name: str, seed: int) -> Network:
    """The network itself with the weights that `small_resnet` describes, drawn from a stream of the given name."""
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                bound = 1 / math.sqrt(parameter[0].numel())
                draws = uniforms(tuple(parameter.shape), name, seed, parameter_name)
                parameter.copy_(torch.from_numpy((2 * draws - 1) * bound))
        network.get_parameter("head.bias").zero_()
    return network.to(memory_format=torch.channels_last)
