"""Run training steps on fake CUDA tensors, without a GPU, and record what would make the host wait for the device.

The loop is the real one. Left out are the backward pass, for which autograd needs the CUDA driver (gradients are empty
tensors instead), and everything with several processes. Of that, torch's SyncBatchNorm is known to wait once per layer
and forward pass (`count_all[mask]`), when MiM's network is fine-tuned on several GPUs.
"""

import traceback
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import monai.losses.dice
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.data.loader import to_device
from common.distributed import Run
from common.training.loop import UpdateRule, train_one_epoch
from common.training.optim import build_optimizer
from common.training.parallel import autocast_dtype
from common.training.state import TrainingState
from tests.helpers import ROOT

CUDA = torch.device("cuda", 0)

# operations whose result on the host depends on values of a device tensor
READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "is_nonzero", "equal", "item")

# (file, function) of copies between host and device that need no wait: the batch, from pinned memory and non_blocking
ALLOWED = {("common/data/loader.py", "to_device")}


class Waits(TorchDispatchMode):
    """Record operations for which the host waits for the device.

    `found` holds each operation and the line of this repository, MONAI or timm that calls it; `allowed` holds the
    places of ALLOWED that were used.
    """

    def __init__(self):
        super().__init__()
        self.found: list[str] = []
        self.allowed: set[tuple[str, str]] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        if any(t.device.type == "cuda" for t in _tensors(args)) and self._reads(name, function, args, kwargs):
            # a fake tensor has no value to continue with
            raise AssertionError(f"{function} at {self._place()[1]}")
        result = function(*args, **kwargs)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            if source.device.type != target.device.type:
                self._record(f"{function} {source.device.type} -> {target.device.type}")
        return result

    @staticmethod
    def _reads(name, function, args, kwargs) -> bool:
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            indices = [index for index in args[1] if index is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or i.device.type != "cuda" for i in indices)
        if name == "repeat_interleave":
            return function._overloadname != "self_int" and kwargs.get("output_size") is None
        return name.startswith("_unique") or name.removeprefix("_") in [read.removeprefix("_") for read in READS]

    def _record(self, what: str) -> None:
        place, line = self._place()
        if place in ALLOWED:
            self.allowed.add(place)
        else:
            self.found.append(f"{what} at {line}")

    @staticmethod
    def _place() -> tuple[tuple[str, str], str]:
        """Return ((file, function), text with the line) of the innermost call in the watched code."""
        frames = [f for f in traceback.extract_stack() if f.filename != __file__ and not f.name.startswith("<")]
        own = [f for f in frames if _is_watched(f.filename)]
        frame = (own or frames)[-1]
        path = Path(frame.filename)
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
        return (name, frame.name), f"{name}:{frame.lineno}, {frame.name}"


def _is_watched(filename: str) -> bool:
    # the environment may be in the folder of the repository
    if "/site-packages/" in filename:
        return "/monai/" in filename or "/timm/" in filename
    return filename.startswith(f"{ROOT}/")


def _tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


@contextmanager
def fake_cuda():
    """Use fake tensors, and make autocast and the gradient scaler believe that CUDA is available."""
    with ExitStack() as stack:
        for name, value in (
            ("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            ("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
        ):
            stack.enter_context(mock.patch(name, value))
        stack.enter_context(mock.patch.object(monai.losses.dice, "torch", _Torch()))
        stack.enter_context(FakeTensorMode())
        yield


class _Torch:
    """Stand-in for torch in MONAI's Dice, which reads its axes from a tensor; a fake tensor has no values."""

    def __getattr__(self, name):
        return getattr(torch, name)

    def arange(self, *args, **kwargs):
        return torch.arange(*args, **kwargs) if kwargs else SimpleNamespace(tolist=lambda: list(range(*args)))


def moved(method: nn.Module) -> nn.Module:
    """Replace the parameters and buffers of the method by fake CUDA tensors, within `fake_cuda`."""
    for module in method.modules():
        for name, p in module._parameters.items():
            if p is not None:
                fake = torch.empty(p.shape, dtype=p.dtype, device=CUDA)
                module._parameters[name] = nn.Parameter(fake, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=CUDA)
    return method


def train(
    method: nn.Module,
    batch,
    weights: dict[str, float],
    make_optimizer=None,
    amp="bf16",
    updates=1,
    accum=1,
    prepare=to_device,
):
    """Run `updates` of `accum` micro-batches; return the losses of every forward pass, and the Waits.

    `batch()` returns a batch in host memory, as the loader does, and `prepare` makes of it what the method takes.
    """
    reported = []
    with fake_cuda():
        method.register_forward_hook(lambda module, args, values: reported.append(values))
        method = moved(method)
        optimizer = (make_optimizer or (lambda method: build_optimizer(method, 0.05)))(method)
        state = TrainingState(method, optimizer, Run(CUDA), autocast_dtype(amp, CUDA), spike_factor=3.0)
        rule = UpdateRule(lambda step: 1e-3, lambda step: weights, accum=accum, clip_grad=3.0)
        batches = [batch() for _ in range(updates * accum)]

        def backward(loss):
            assert loss.device == CUDA and loss.ndim == 0
            for p in method.parameters():
                if p.requires_grad:
                    p.grad = torch.empty_like(p)

        def gradient(loss, at, **kwargs):
            return (torch.empty_like(at),)

        with mock.patch("torch.Tensor.backward", backward), mock.patch("torch.autograd.grad", gradient):
            with Waits() as waits:
                train_one_epoch(state, (prepare(host, CUDA) for host in batches), updates, rule)
        assert state.step == updates
    return reported, waits


def check(reported, waits: Waits, names: set[str]) -> None:
    """Assert that all losses in `names` are float32 scalars on the device, and that only the batch was copied."""
    assert names <= {name for values in reported for name in values}
    for values in reported:
        for name, value in values.items():
            assert (value.device, value.dtype, value.ndim) == (CUDA, torch.float32, 0), name
    assert not waits.found, "\n".join(dict.fromkeys(waits.found))
    # no unused exception
    assert waits.allowed == ALLOWED
