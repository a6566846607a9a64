"""Layers whose weights lie in host memory and are copied to the device ahead of use: targets that do not fit.

Some weights cross the bus in every forward, which takes as long for one token as for two hundred: drafts are checked
for nothing. Two buffers on the device hold the weights of the layer at work and of the one that comes next. Where the
model runs another order than the last time (its first layers alone, as an early exit), what is missing is copied then;
a layer that still lies in a buffer is not copied again.

Source: the layer-wise streaming of Sheng et al. 2023 (FlexGen) with a double buffer."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from attention.hf.device import device_of, offloads
from specdec.model.decoder_layers import name_of_layers

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

ALIGNMENT = 256  # bytes between the beginnings of parameters in a buffer
BUFFERS = 2


class HostWeights:
    """The parameters of one layer, side by side in one block of host memory, pinned if `pinned`."""

    def __init__(self, parameters: Sequence[nn.Parameter], pinned: bool):
        self.parameters, self._places, self.nbytes = list(parameters), [], 0
        for parameter in parameters:
            like = torch.empty_like(parameter, device="meta")  # dense, with the order of dimensions kept
            self._places.append((self.nbytes, like.dtype, like.shape, like.stride()))
            self.nbytes += -(-like.numel() * like.element_size() // ALIGNMENT) * ALIGNMENT
        self.block = torch.empty(self.nbytes, dtype=torch.uint8, pin_memory=pinned)
        self.own = self.within(self.block)
        for parameter, place in zip(parameters, self.own, strict=True):
            place.copy_(parameter.data)
        self.lie_in(self.own)

    def within(self, block: Tensor) -> list[Tensor]:
        """The parameters' places in a block of bytes."""
        places = []
        for start, dtype, shape, stride in self._places:
            numbers = block[start : start + shape.numel() * dtype.itemsize].view(dtype)
            places.append(numbers.as_strided(shape, stride, numbers.storage_offset()))
        return places

    def lie_in(self, places: Sequence[Tensor]) -> None:
        """Let the parameters be views of other memory."""
        for parameter, place in zip(self.parameters, places, strict=True):
            parameter.data = place

    def versions(self) -> tuple:
        """How often each parameter was written to (not known of inference tensors)."""
        return tuple(None if p.is_inference() else p._version for p in self.parameters)

    @property
    def moved(self) -> bool:
        """Whether somebody has put the parameters elsewhere."""
        return any(p.data_ptr() != own.data_ptr() for p, own in zip(self.parameters, self.own, strict=True))


class DeviceBuffer:
    """Room on the device for the weights of one layer at a time.

    holds, versions: whose weights these are, and `HostWeights.versions` of them. ready: they have come; done: what was
    last computed with them has ended (None on a CPU, where a copy ends before it returns)."""

    def __init__(self, weights: Sequence[HostWeights], device: torch.device):
        self.memory = torch.empty(max(w.nbytes for w in weights), dtype=torch.uint8, device=device)
        self.places = [w.within(self.memory) for w in weights]
        self.holds: int | None = None
        self.versions: tuple = ()
        self.ready: Any = torch.cuda.Event() if device.type == "cuda" else None
        self.done: Any = torch.cuda.Event() if device.type == "cuda" else None


class StreamedLayers:
    """Brings the weights of some layers for each of their forwards; made by `stream_layers`.

    indices: of these layers. nbytes: of their weights, in host memory. One thread runs a streamed layer at a time; the
    parameters lie in host memory whenever none does."""

    def __init__(self, layers: dict[int, nn.Module], parameters: dict[int, list[nn.Parameter]], device: torch.device):
        self.indices, self.device, self._layers = tuple(layers), device, list(layers.values())
        self._weights = [HostWeights(parameters[index], device.type == "cuda") for index in layers]
        self.nbytes = sum(weights.nbytes for weights in self._weights)
        count = min(BUFFERS, len(layers))
        self._buffers = [DeviceBuffer(self._weights, device) for _ in range(count)]  # the least recently wanted first
        self._lock = threading.RLock()
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None
        if self._copies is not None:  # the buffers' memory may have been another tensor's until now
            self._copies.wait_stream(torch.cuda.current_stream(device))
        for number, layer in enumerate(self._layers):
            vars(layer)["forward"] = partial(self._run, number, layer)

    @property
    def addresses(self) -> tuple[int, ...]:
        """Where the buffers lie."""
        return tuple(sorted(buffer.memory.data_ptr() for buffer in self._buffers))

    def explain(self) -> str:
        """Why such a model runs eagerly, for `ModelRunner.explain`."""
        layers = ", ".join(map(str, self.indices))
        return f"layers {layers} ({self.nbytes / 2**20:.1f} MiB) are streamed from host memory, which is not captured"

    def stop(self) -> None:
        """Leave all weights in host memory and the layers as they were."""
        with self._lock:
            if self._copies is not None:
                torch.cuda.synchronize(self.device)
            for layer in self._layers:
                vars(layer).pop("forward", None)

    def __deepcopy__(self, memo: dict) -> "StreamedLayers":
        raise TypeError("layers whose weights are streamed cannot be copied; end that with stream_layers(model, 0)")

    def _run(self, number: int, layer: nn.Module, *arguments, **keywords) -> Any:
        """The forward of `layer`, which is a streamed layer or a twin of it."""
        weights = self._weights[number]
        if torch.is_grad_enabled() and _records((*weights.parameters, *arguments, *keywords.values())):
            raise RuntimeError(
                f"the weights of layer {self.indices[number]} are streamed, so there is no backward pass through it: "
                "run the model under torch.no_grad() or torch.inference_mode()"
            )
        with self._lock:
            buffer = self._bring(number)
            self._bring((number + 1) % len(self._weights))
            if self._copies is not None:
                stream = torch.cuda.current_stream(self.device)
                stream.wait_event(buffer.ready)
                stream.wait_event(buffer.done)  # of another thread's stream: else its end would be forgotten
            try:
                weights.lie_in(buffer.places[number])
                return type(layer).forward(layer, *arguments, **keywords)
            finally:
                weights.lie_in(weights.own)
                if buffer.done is not None:
                    buffer.done.record(torch.cuda.current_stream(self.device))

    def _bring(self, number: int) -> DeviceBuffer:
        """The buffer with these weights, which may still be on their way."""
        weights = self._weights[number]
        if weights.moved:
            raise RuntimeError(
                f"the weights of layer {self.indices[number]} were moved or cast since they began to be streamed: "
                "call stream_layers again"
            )
        versions = weights.versions()
        buffer = next((one for one in self._buffers if one.holds == number), self._buffers[0])
        self._buffers.remove(buffer)
        self._buffers.append(buffer)
        if buffer.holds != number or buffer.versions != versions:
            buffer.holds = None
            self._copy(weights.block, buffer)
            buffer.holds, buffer.versions = number, versions
        return buffer

    def _copy(self, block: Tensor, buffer: DeviceBuffer) -> None:
        target = buffer.memory[: len(block)]
        if self._copies is None:
            target.copy_(block)
            return
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(buffer.done)
            target.copy_(block, non_blocking=True)
            buffer.ready.record(self._copies)


def stream_layers(model: "PreTrainedModel", count: int, device: torch.device | str | None = None) -> StreamedLayers:
    """Keep the weights of `count` decoder layers in host memory, and all other weights on `device` (None: the model's).

    They are spread evenly, and the weights of each are copied into one of two buffers on the device while earlier
    layers compute. Results are those of the model with all weights on the device, bit for bit. A `ModelRunner` runs
    such a model in mode "eager". Weights that a layer shares with other modules, and buffers of modules, stay on the
    device. Writing to a weight in place is noticed, but not through `.data`; there is no backward pass. A further call
    replaces the one before; `count` 0 ends the streaming. Two layers or fewer stay in their buffers for good.

    Raises ValueError for a count outside 0 … layers, for weights that accelerate offloads, that are split over ranks
    or of a type of their own (quantised by torchao), for layers that keep most of their numbers in buffers (GPTQ), and
    for a model whose first parameter, by which transformers tells its device, would be streamed.

    >>> import specdec
    >>> target = specdec.load_tiny_pair().target
    >>> streamed = stream_layers(target, 2)
    >>> streamed.indices[-1] == target.config.num_hidden_layers - 1
    True
    """
    layers = list(cast(nn.ModuleList, model.get_submodule(name_of_layers(model))))
    if not 0 <= count <= len(layers):
        raise ValueError(f"count must lie between 0 and the model's {len(layers)} layers, got {count}")
    where = device_of(model) if device is None else torch.device(device)
    spread = [(number + 1) * len(layers) // count - 1 for number in range(count)]
    chosen = {i: layers[i] for i in spread if not any(layers[i] is layers[j] for j in spread if j < i)}
    parameters = {index: _own_parameters(model, layer) for index, layer in chosen.items()}
    for index, layer in chosen.items():
        if (why := _why_not(layer, parameters[index])) is not None:
            raise ValueError(f"layer {index} of {type(model).__name__} cannot be streamed: {why}")
    streamed = {id(parameter) for own in parameters.values() for parameter in own}
    if id(next(model.parameters())) in streamed:
        raise ValueError(f"{type(model).__name__} begins with a streamed layer, whose place is not that of its inputs")
    if (before := streamed_layers(model)) is not None:
        before.stop()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None and id(parameter) not in streamed:
                parameter.data = parameter.data.to(where)
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(where)
    return StreamedLayers(chosen, parameters, where)


def streamed_layers(model: nn.Module) -> StreamedLayers | None:
    """What streams layers of `model`, or of the model that it was made of; None: nothing."""
    return next((found for module in model.modules() if (found := streamed_by(module)) is not None), None)


def streamed_by(module: nn.Module) -> StreamedLayers | None:
    """What brings the weights of this very module, or of the one that it is a twin of."""
    function = getattr(vars(module).get("forward"), "func", None)
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, StreamedLayers) else None


def _own_parameters(model: nn.Module, layer: nn.Module) -> list[nn.Parameter]:
    """The parameters of `layer`, each once, that no module outside it holds."""
    inside = set(layer.modules())
    others = {id(p) for module in model.modules() if module not in inside for p in module._parameters.values()}
    return [parameter for parameter in layer.parameters() if id(parameter) not in others]


def _why_not(layer: nn.Module, parameters: Sequence[nn.Parameter]) -> str | None:
    """Why a layer with these own parameters cannot be streamed; None: it can."""
    if any(offloads(module) for module in layer.modules()):
        return "accelerate offloads its weights"
    if "forward" in vars(layer) and streamed_by(layer) is None:
        return "its forward was replaced"
    for name, parameter in layer.named_parameters():
        if type(parameter.data) is not Tensor or parameter.is_inference() or parameter.device.type == "meta":
            kind = type(parameter.data).__name__
            return f"{name} is a {kind} on {parameter.device}, not a plain tensor that can be copied byte by byte"
    sizes = [sum(x.numel() * x.element_size() for x in given) for given in (layer.buffers(), parameters)]
    return "most of its numbers are buffers, which stay on the device" if sizes[0] >= sizes[1] else None


def _records(values: Sequence[object]) -> bool:
    return any(isinstance(value, Tensor) and value.requires_grad for value in values)
