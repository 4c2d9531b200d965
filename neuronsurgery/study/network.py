"""The network of the embedded data: three residual blocks, small enough to train within a minute on one core."""

from __future__ import annotations

import math
from collections import OrderedDict
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
    """A freshly initialised `SmallResNet` in training mode, the same for a seed on any machine; see `initialised`."""
    with torch.random.fork_rng(devices=[]):  # the constructors of torch draw from the global state
        network = SmallResNet(classes)
    return initialised(network, "small_resnet", seed)


def initialised(network: Network, name: str, seed: int) -> Network:
    """The network itself with new weights, from a stream of the given name; the global random state is left alone.

    Weights of convolutions and of the head are uniform within +-1 / sqrt(inputs of a neuron), as torch draws them;
    biases are 0, norms the identity. They are laid out channels last, which on a CPU makes training a quarter faster.
    """
    with torch.no_grad():
        for parameter_name, parameter in network.named_parameters():
            if parameter.ndim > 1:
                bound = 1 / math.sqrt(parameter[0].numel())
                draws = uniforms(tuple(parameter.shape), name, seed, parameter_name)
                parameter.copy_(torch.from_numpy((2 * draws - 1) * bound))
        network.get_parameter("head.bias").zero_()
    return network.to(memory_format=torch.channels_last)
