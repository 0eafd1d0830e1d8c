"""The order of channels in memory: of MiM's depthwise convolutions, and of the networks for segmentation."""

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.harness import compare, threads
from Finetune import depthwise3d
from Finetune.architectures import ModelSettings, build_model, resolve
from Finetune.presets import load_preset

# small, so that a step takes seconds on a CPU
NETWORKS: dict[str, dict[str, Any]] = {
    "unetr": {"size": "tiny", "patch_size": (16, 16, 16), "feature_size": 16},
    "mim": {"size": "tiny"},
    "dynunet": {"feature_size": 8},
}


def measure(quick: bool, device: torch.device) -> list[dict[str, Any]]:
    """Return the rows of this benchmark.

    Raises:
        AssertionError: the two sides of a comparison do not compute the same.
    """
    rounds = 1 if quick else 3
    with threads(1):
        rows = [measure_depthwise(quick, device, rounds)]
        return rows + [measure_network(name, quick, device, rounds) for name in NETWORKS]


def measure_depthwise(quick: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare a depthwise convolution in the layout that is used on the device with the other layout."""
    chans, size = (24, 12) if quick else (96, 24)
    x = torch.randn(1, size, size, size, chans, device=device, requires_grad=True)
    weight = torch.randn(chans, 1, 5, 5, 5, device=device, requires_grad=True)
    bias = torch.zeros(chans, device=device, requires_grad=True)
    used = depthwise3d.CHANNELS_LAST_ON
    layouts = {True: "last", False: "first"}

    def step(others: set[str]) -> tuple[Tensor, ...]:
        with mock.patch.object(depthwise3d, "CHANNELS_LAST_ON", others):
            y = depthwise3d.depthwise_conv3d(x, weight, bias)
            return torch.autograd.grad(y.square().mean(), (x, weight, bias))

    other = used ^ {device.type}
    for a, b in zip(step(used), step(other)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    return compare(
        f"depthwise convolution 5^3 of {chans} channels on {size}^3, channels {layouts[device.type in used]}",
        partial(step, used),
        partial(step, other),
        against=f"channels {layouts[device.type in other]}",
        device=device,
        rounds=rounds,
    )


def measure_network(name: str, quick: bool, device: torch.device, rounds: int) -> dict[str, Any]:
    """Compare a step of fine-tuning with `--channels_last` with the same step without."""
    size = 64 if quick else 96
    settings = ModelSettings(model=name, roi=(size,) * 3, drop_path=0.0, **NETWORKS[name])
    architecture, crop = resolve(settings, load_preset("BTCV"), None), torch.rand(1, 1, size, size, size, device=device)

    def build(move: Callable[[nn.Module], nn.Module]) -> nn.Module:
        torch.manual_seed(0)
        return move(build_model(architecture).to(device).train())

    plain, last = build(lambda model: model), build(lambda model: model.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(backward(last, crop), backward(plain, crop), rtol=1e-3, atol=1e-5)
    return compare(
        f"{name}, a crop of {size}^3, forward and backward, --channels_last",
        partial(backward, last, crop),
        partial(backward, plain, crop),
        against="channels first",
        device=device,
        rounds=rounds,
    )


def backward(model: nn.Module, crop: Tensor) -> Tensor:
    """Add the gradients of the mean squared output to those of the model. Return that mean."""
    loss = logits_of(model(crop)).square().mean()
    loss.backward()
    return loss.detach()


def logits_of(output: Any) -> Tensor:
    """Return the logits: dynunet also returns those of deep supervision."""
    return output[0] if isinstance(output, (list, tuple)) else output
