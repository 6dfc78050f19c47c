#!/usr/bin/env python3
"""Collects what the linear layers of a PyTorch model read, for `quantize.ts --calibrate`.

    with collect(pipe, "statistics.safetensors"):   # a diffusers pipeline, or a model
        pipe("a lighthouse in a storm")

    python collect_statistics.py MODEL statistics.safetensors --prompts prompts.txt

One file; it needs PyTorch and nothing else. The model runs as it always does, on its own device; every input of an
`nn.Linear` is added up in float32 there: second moment (whole, in blocks on its diagonal, or the diagonal alone),
mean, range and histogram, the last three and the diagonal by groups of the denoising time. docs/statistics.md has the
format and what it takes for models of 12 B weights. The file is written when the block ends without an error, in one
step: it is whole or absent.
"""
from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import math
import os
import re
import sys
import tempfile
import uuid
import weakref
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

try:
    import torch
except ModuleNotFoundError:
    if __name__ != "__main__":
        raise
    sys.exit(f"collect_statistics.py needs PyTorch, which {sys.executable} lacks: run it by the Python that runs the model")

FORMAT, VERSION = "arrowquant calibration statistics", "2"
BINS = 2048
"""Bins of a histogram."""
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}
"""Layers that diffusers' fuse_qkv_projections() runs in place of others."""
MODEL_SAMPLES = 8
"""Weights of each layer by which a model is told from another one."""
FULL_BYTES = 4 * 2**30
"""Second moments of all layers are kept whole up to here by default, in blocks beyond."""
DEFAULT_BLOCK = 1024
CORRELATED_ROWS = 1024
"""Rows of a moment that become correlations at once."""
TIME_NAMES = ("timestep", "timesteps", "t", "time", "sigma")
TOKEN_NAMES = ("input_ids", "tokens", "x")
TEXT_MASKS = ("attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask")
WEIGHTS = {"predicted": 1.0, "visible": 0.3, "padding": 0.1}
"""What a position counts: predicted tokens are the loss, visible ones are read by attention, padding is mostly alike."""
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.int32: "I32"}


class StatisticsError(Exception):
    """Statistics cannot be collected; the message says of what, what was needed and what was found."""


@dataclass
class Now:
    """What is known of the forward pass that is running."""

    samples: int = 0
    groups: list[int] = field(default_factory=list)
    positions: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    """Weights of positions by samples and positions a sample."""


class Histogram:
    """Values in equal parts of [-reach, reach]; the reach is a power of two and only grows."""

    def __init__(self) -> None:
        self.minimum = self.maximum = self.reach = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.seen = False

    def add(self, x: torch.Tensor, low: float, high: float) -> None:
        largest = max(-low, high, 2.0**-60)
        if not self.seen:
            self.minimum, self.maximum, self.reach, self.seen = low, high, 2.0 ** math.ceil(math.log2(largest)), True
        while self.reach < largest:
            halved = self.counts.view(-1, 2).sum(1)
            self.counts = torch.zeros_like(self.counts)
            self.counts[BINS // 4 : 3 * BINS // 4] = halved
            self.reach *= 2
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        self.counts += torch.histc(x, BINS, -self.reach, self.reach).cpu().double()

    @property
    def range(self) -> list[float]:
        return [self.minimum, self.maximum, self.reach]


class Input:
    """Sums over what one layer reads, or several that read the same tensor."""

    def __init__(self, name: str, cols: int, block: int, groups: int, second: torch.Tensor) -> None:
        self.name, self.cols, self.block, self.groups = name, cols, block, groups
        self.layers = [name]
        self.second = second
        self.weight = torch.zeros(groups, dtype=torch.float64)
        self.tokens = torch.zeros(groups, dtype=torch.float64)
        self.samples = torch.zeros(groups, dtype=torch.float64)
        self.sum = torch.zeros(groups, cols, dtype=torch.float64)
        self.squares = torch.zeros(groups, cols, dtype=torch.float64)
        self.histograms = [Histogram() for _ in range(groups)]
        self.last: Seen | None = None

    def add(
        self, x: torch.Tensor, weights: torch.Tensor | None, now: Now, samples: torch.Tensor | None = None
    ) -> None:
        """Adds rows; `samples` says which each belongs to where they do not lie together, one as long as another."""
        if x.shape[0] > 0:
            with exactly(x.device):
                self.add_rows(x, weights, now, samples)

    def add_rows(
        self, x: torch.Tensor, weights: torch.Tensor | None, now: Now, samples: torch.Tensor | None
    ) -> None:
        rows = x.shape[0]
        for group, index in rows_by_group(now, rows, samples):
            own = x if index is None else x[index]
            w = None if weights is None else weights if index is None else weights[index]
            low, high = (value.item() for value in torch.aminmax(own))
            if not (math.isfinite(low) and math.isfinite(high)):
                raise StatisticsError(f"{self.name}: its inputs must be finite, got a range of [{low}, {high}]")
            weighted = own if w is None else own * w[:, None]
            self.weight[group] += own.shape[0] if w is None else precise_sum(w)
            self.tokens[group] += own.shape[0]
            self.samples[group] += max(1, now.groups.count(group)) if index is not None else max(1, now.samples)
            self.sum[group] += precise_sum(weighted)
            self.squares[group] += precise_sum(weighted * own)
            self.histograms[group].add(own, low, high)
        add_moment(self.second, x, weights, self.block)

    def tensors(self, is_half: bool) -> Iterator[tuple[str, torch.Tensor | Correlations]]:
        cols = self.cols
        second = self.second.view(cols, cols) if self.block == cols else self.second
        yield f"{self.name}.weight", self.weight
        yield f"{self.name}.tokens", self.tokens
        yield f"{self.name}.samples", self.samples
        yield f"{self.name}.sum", self.sum
        yield f"{self.name}.squares", self.squares
        if is_half and self.block > 1:
            yield f"{self.name}.correlations", Correlations(self)
        else:
            yield f"{self.name}.second", second
        yield f"{self.name}.range", torch.tensor([each.range for each in self.histograms], dtype=torch.float64)
        yield f"{self.name}.histogram", torch.stack([each.counts for each in self.histograms])


class Correlations:
    """A second moment below the diagonal of each block, by the roots of sums of squares; made when it is written."""

    dtype = torch.float16

    def __init__(self, own: Input) -> None:
        self.own = own
        self.widths = [min(own.block, own.cols - first) for first in range(0, own.cols, own.block)]
        self.shape = [sum(width * (width - 1) // 2 for width in self.widths)]

    def numel(self) -> int:
        return self.shape[0]

    def element_size(self) -> int:
        return 2

    def detach(self) -> torch.Tensor:
        squares = self.own.squares.sum(0)
        inverse = torch.where(squares > 0, squares.rsqrt(), 0.0).split(self.own.block)
        parts, at = [], 0
        for width, scale in zip(self.widths, inverse):
            moment = self.own.second[at : at + width * width].view(width, width)
            for begin, rows in zip(range(0, width, CORRELATED_ROWS), moment.split(CORRELATED_ROWS)):
                below = torch.ones(rows.shape, dtype=torch.bool).tril(begin - 1)
                scaled = rows.cpu().double() * scale[begin : begin + len(rows), None] * scale
                parts.append(scaled[below].clamp(-1, 1).half())
            at += width * width
        return torch.cat(parts)


def exactly(device: torch.device) -> AbstractContextManager:
    """No autocast, under which products of float32 are of half precision."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Seen:
    """A tensor that a layer has read, to be recognised while it lives and is not changed."""

    def __init__(self, x: torch.Tensor) -> None:
        self.tensor, self.mark = weakref.ref(x), mark(x)

    def is_of(self, x: torch.Tensor) -> bool:
        return self.tensor() is x and self.mark == mark(x)


def mark(x: torch.Tensor) -> object:
    """Changes when a tensor's values are written over; inference tensors have no version, some values stand for it."""
    if not x.is_inference():
        return x._version
    flat = x.detach().reshape(-1)
    return tuple(flat[:: max(1, flat.numel() // 64)].tolist())


def precise_sum(x: torch.Tensor) -> torch.Tensor:
    """Sum over rows, in float64 where the device has it."""
    if x.device.type == "mps":
        return x.sum(0).cpu().double()
    return x.sum(0, dtype=torch.float64).cpu()


def moment_size(cols: int, block: int) -> int:
    whole, rest = divmod(cols, block)
    return whole * block * block + rest * rest


def add_moment(second: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None, block: int) -> None:
    """Adds the sum of w x xT, of blocks of columns on the diagonal one after the other."""
    rows, cols = x.shape
    weighted = x if weights is None else x * weights[:, None]
    whole = cols // block
    at = whole * block
    if whole > 0:
        left = weighted[:, :at].reshape(rows, whole, block).permute(1, 2, 0)
        right = x[:, :at].reshape(rows, whole, block).permute(1, 0, 2)
        products = symmetric(torch.bmm(left, right))
        second[: whole * block * block] += products.reshape(-1).to(second.device)
    if at < cols:
        products = symmetric((weighted[:, at:].T @ x[:, at:])[None])
        second[whole * block * block :] += products.reshape(-1).to(second.device)


def symmetric(products: torch.Tensor) -> torch.Tensor:
    """The same either way round, which products of matrices are only nearly."""
    return products.triu() + products.triu(1).transpose(1, 2)


def rows_by_group(
    now: Now, rows: int, samples: torch.Tensor | None
) -> Iterator[tuple[int, torch.Tensor | None]]:
    """Time groups with the rows that belong to them; None stands for all."""
    groups = sorted(set(now.groups))
    if len(groups) <= 1:
        yield (groups[0] if groups else 0), None
        return
    if samples is None and rows % now.samples != 0:
        # Rows that a router has chosen: which samples they are of is not known.
        yield max(groups, key=now.groups.count), None
        return
    own = torch.tensor(now.groups)
    own = own.repeat_interleave(rows // now.samples) if samples is None else own[samples.cpu()]
    for group in groups:
        index = (own == group).nonzero()[:, 0]
        if len(index) > 0:
            yield group, index


class Collector:
    """Hooks of a model, and what they have seen; `collect` makes one."""

    def __init__(
        self,
        model: torch.nn.Module,
        *,
        name: str | None,
        source: str,
        synthetic: bool,
        layers: str,
        moment: str | int,
        precision: str,
        groups: int,
        bins: int,
        time: Callable[..., object] | None,
        mask_token: int | None,
        pad_token: int | None,
        shift: int,
        device_bytes: float | None,
        scratch: str,
    ) -> None:
        self.model, self.name = model, name or type(model).__name__
        self.source, self.synthetic = source, synthetic
        self.time_of, self.mask_token, self.pad_token, self.shift = time, mask_token, pad_token, shift
        inner = called_by(model)
        self.signature = inspect.signature(inner.forward)
        self.has_time = mask_token is not None or time is not None or any(
            each in self.signature.parameters for each in TIME_NAMES
        )
        self.axis = "mask_ratio" if mask_token is not None else "timesteps"
        self.bins = bins
        self.groups = groups if self.has_time else 1
        self.now, self.inputs, self.input_of = Now(), {}, {}
        self.recent: list[Input] = []
        self.samples, self.counted = {}, 0
        if not 1 <= groups <= bins:
            raise StatisticsError(f"groups must be 1 to bins, got {groups} of {bins}")
        self.device_bytes, self.scratch, self.held_bytes = device_bytes, scratch, 0
        self.positions: torch.Tensor | None = None
        self.times: object | None = None
        self.are_shares = True
        adapters = {id(part) for module in inner.modules() for part in adapter_parts(module)}
        named = [(clean(path), module) for path, module in inner.named_modules() if id(module) not in adapters]
        linear = {f"{path}.weight": module for path, module in named if isinstance(module, torch.nn.Linear)}
        self.linear = linear
        self.parts = {name: parts for name in linear if (parts := parts_of(name, linear))}
        self.adapted = {f"{path}.weight": module for path, module in named if hasattr(module, "get_delta_weight")}
        self.modules = {
            name: module for name, module in linear.items()
            if any(re.search(layers, each.removesuffix(".weight")) for each in self.parts.get(name, [name]))
        }
        self.experts = {path: module for path, module in named if is_experts(module) and re.search(layers, path)}
        # A weight in codes has another shape.
        self.shapes = {
            part: [module.out_features, module.in_features]
            for name in self.modules for part in self.parts.get(name, [name]) for module in [linear[part]]
        }
        for path, module in self.experts.items():
            self.shapes.update({name: list(weight.shape) for name, weight in expert_weights(path, module)})
        if not self.shapes:
            raise StatisticsError(f"{self.name} must have an nn.Linear whose name matches {layers!r}, got none")
        if precision not in ("float32", "float16"):
            raise StatisticsError(f"precision must be float32 or float16, got {precision!r}")
        self.is_half = precision == "float16"
        self.block_of = block_rule(moment, [cols for _, cols in self.shapes.values()])
        self.handles: list = []

    def __enter__(self) -> Collector:
        self.handles.append(self.model.register_forward_pre_hook(self.begin, with_kwargs=True))
        for name, module in self.modules.items():
            hook = lambda module, args, kwargs, name=name: self.see_all(name, (*args, *kwargs.values())[0])
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        for path, module in self.experts.items():
            hook = lambda module, args, kwargs, path=path: self.see_experts(path, module, *args, *kwargs.values())
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        return self

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    @torch.no_grad()
    def begin(self, _: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a pass of the model: samples, their times and the weights of positions."""
        given = self.signature.bind_partial(*args, **kwargs).arguments
        given = {**given.get("kwargs", {}), **given}
        tokens = next((given[each] for each in TOKEN_NAMES if is_tokens(given.get(each))), None)
        samples = len(tokens) if tokens is not None else samples_of(given.values())
        positions = {}
        for key in TEXT_MASKS:
            mask = given.get(key)
            if isinstance(mask, torch.Tensor) and mask.dim() == 2 and mask.dtype in (torch.bool, torch.long, torch.int):
                positions[tuple(mask.shape)] = torch.where(mask.bool(), 1.0, WEIGHTS["padding"])
        if tokens is not None and self.mask_token is not None:
            positions[tuple(tokens.shape)] = self.token_weights(tokens)
        if self.positions is not None:
            positions[tuple(self.positions.shape)] = self.positions
        times = self.times if self.times is not None else self.times_of(given, tokens)
        times = torch.as_tensor(times if self.has_time else 0.0).detach().cpu().double()
        if times.dim() > 1 and len(times) == samples:
            times = times.reshape(samples, -1).amax(1)  # of tokens: given ones are at time 0
        values = times.reshape(-1).tolist()
        if len(values) not in (1, samples):
            raise StatisticsError(f"{self.name}: times must be one, or one a sample ({samples}), got {len(values)}")
        groups = [self.group(each) for each in (values * samples if len(values) == 1 else values)]
        self.now = Now(samples, groups, positions)
        self.counted += samples
        self.recent = []

    def token_weights(self, tokens: torch.Tensor) -> torch.Tensor:
        is_masked = tokens == self.mask_token
        predicted = is_masked.clone()
        if self.shift > 0:
            predicted[:, : -self.shift] |= is_masked[:, self.shift :]
        weights = torch.full(tokens.shape, WEIGHTS["visible"], device=tokens.device)
        if self.pad_token is not None:
            weights[tokens == self.pad_token] = WEIGHTS["padding"]
        weights[predicted] = WEIGHTS["predicted"]
        return weights

    def times_of(self, given: dict, tokens: torch.Tensor | None) -> object:
        """Times of a pass: mask ratios, or timesteps from 0 on; shares of 1 become timesteps."""
        if self.time_of is not None:
            return self.time_of(given)
        if self.mask_token is not None:
            if tokens is None:
                raise StatisticsError(f"{self.name}: it must be called with tokens, got {', '.join(given)}")
            used = torch.ones_like(tokens) if self.pad_token is None else tokens != self.pad_token
            # In float64, as the axis is divided: 3 of 5 in float32 lies above 0.6.
            return (tokens == self.mask_token).sum(1).double() / used.sum(1).clamp(min=1)
        found = next((given[each] for each in TIME_NAMES if given.get(each) is not None), None)
        if found is None:
            if not self.has_time:
                return 0.0
            raise StatisticsError(f"{self.name}: it must be called with one of {', '.join(TIME_NAMES)}")
        times = torch.as_tensor(found).cpu()
        if times.is_floating_point() and times.numel() > 0:
            # Samplers begin with the largest: after a time above 1 a small one is a timestep too.
            self.are_shares = self.are_shares and times.max().item() <= 1
            if self.are_shares:
                times = times.double() * self.bins
                # 0.7 in float32 is 699.99999 of 1000: what lies that near below a whole number is meant as one.
                times = torch.where((times.round() - times).abs() < 1e-4, times.round(), times)
        return times.double().clamp(0, self.bins - 1).floor()

    def group(self, time: float) -> int:
        """Index of the time group: the axis is divided into equal parts."""
        if not self.has_time:
            return 0
        place = math.ceil(time * self.bins) - 1 if self.axis == "mask_ratio" else math.floor(time)
        place = min(max(place, 0), self.bins - 1)
        return max(g for g, edge in enumerate(self.boundaries[:-1]) if edge <= place)

    @property
    def boundaries(self) -> list[int]:
        return [g * self.bins // self.groups for g in range(self.groups + 1)]

    @torch.no_grad()
    def see_all(self, name: str, x: torch.Tensor) -> None:
        """Before a layer runs, which may be several in one."""
        for part in self.parts.get(name, [name]):
            self.see(part, self.linear[part], x)

    def see(self, name: str, module: torch.nn.Linear, x: torch.Tensor) -> None:
        """Adds what a layer reads, unless another layer has just read the same."""
        own = self.input_of.get(name)
        if own is None:
            self.samples[name] = sampled(merged_weight(module, self.adapted.get(name)), self.shapes[name])
            own = next((each for each in self.inputs.values() if each.last is not None and each.last.is_of(x)), None)
            if own is not None:
                own.layers.append(name)
                self.input_of[name] = own
                return
            self.input_of[name] = own = self.new_input(name, module.in_features, x.device)
        elif own.name != name and not (own.last is not None and own.last.is_of(x)):
            # It had read what another layer reads until now: from here on it is counted by itself.
            own.layers.remove(name)
            self.input_of[name] = own = self.new_input(name, module.in_features, x.device)
        elif own.name != name:
            return
        flat = x.detach().reshape(-1, own.cols).float()
        own.add(flat, self.row_weights(x, flat.shape[0]), self.now)
        own.last = Seen(x)

    @torch.no_grad()
    def see_experts(
        self, path: str, module: torch.nn.Module, x: torch.Tensor, chosen: torch.Tensor, *_: object
    ) -> None:
        """Before experts run that one parameter holds: adds what each reads, and what its last layer will."""
        x = x.reshape(-1, x.shape[-1])
        chosen = chosen.reshape(len(x), -1)
        weights = self.row_weights(x, len(x))
        samples = torch.arange(len(x), device=x.device) * self.now.samples // len(x)
        for expert in range(module.gate_up_proj.shape[0]):
            rows = (chosen == expert).any(1).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            own, last = x[rows], f"{path}.{expert}.down_proj.weight"
            gate, up = torch.nn.functional.linear(own, module.gate_up_proj[expert]).chunk(2, dim=-1)
            w = None if weights is None else weights[rows]
            names = [f"{path}.{expert}.{part}.weight" for part in ("gate_proj", "up_proj")]
            for layers, values in ((names, own), ([last], module.act_fn(gate) * up)):
                if layers[0] not in self.input_of:
                    for name in layers:
                        self.samples[name] = sampled(dict(expert_weights(path, module, expert))[name], self.shapes[name])
                    made = self.new_input(layers[0], values.shape[-1], x.device)
                    made.layers = list(layers)
                    self.input_of.update({name: made for name in layers})
                self.input_of[layers[0]].add(values.float(), w, self.now, samples[rows])

    def row_weights(self, x: torch.Tensor, rows: int) -> torch.Tensor | None:
        for (samples, length), weights in self.now.positions.items():
            if rows == samples * length:
                return weights.reshape(-1).to(x.device, torch.float32)
        return None

    def new_input(self, name: str, cols: int, device: torch.device) -> Input:
        block = self.block_of(cols)
        size = moment_size(cols, block)
        limit = free_bytes(device) if self.device_bytes is None else self.device_bytes
        if self.held_bytes + 4 * size <= limit:
            self.held_bytes += 4 * size
            second = torch.zeros(size, device=device)
        else:
            path = os.path.join(self.scratch, f"{len(self.inputs)}.bin")
            with open(path, "wb") as file:
                file.truncate(4 * size)
            second = torch.from_file(path, shared=True, size=size, dtype=torch.float32)
        self.inputs[name] = Input(name, cols, block, self.groups, second)
        return self.inputs[name]

    def write(self, path: Path) -> None:
        if not self.inputs:
            raise StatisticsError(f"{self.name} must have been run between the lines, got no pass")
        seen = [name for name in self.shapes if name in self.input_of]
        shapes = [[name, *self.shapes[name]] for name in seen]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "model": json.dumps({"name": self.name, "layers": shapes}),
            "axis": self.axis,
            "bins": str(self.bins),
            "second": "total",
            "inputs": json.dumps([
                [each.name, each.layers, each.block] if each.block < each.cols else [each.name, each.layers]
                for each in self.inputs.values()
            ]),
            "runs": json.dumps([{
                "identity": uuid.uuid4().hex,
                "source": self.source,
                "isSynthetic": self.synthetic,
                "samples": self.counted,
            }]),
        }
        tensors = [("time_groups.boundaries", torch.tensor(self.boundaries, dtype=torch.int32))]
        unknown = torch.full((MODEL_SAMPLES,), math.nan)
        known = [unknown if self.samples[name] is None else self.samples[name] for name in seen]
        tensors.append(("model.weights", torch.stack(known)))
        for each in self.inputs.values():
            tensors.extend(each.tensors(self.is_half))
        write_safetensors(path, metadata, tensors)


def clean(path: str) -> str:
    """The name of a module without what torch.compile and adapters put into it."""
    return re.sub(r"(?:^|(?<=\.))(?:_orig_mod|base_layer|_fsdp_wrapped_module)(?:\.|$)", "", path).rstrip(".")


def called_by(model: torch.nn.Module) -> torch.nn.Module:
    """The model in wrappers that hand on what they are called with, as DataParallel and PEFT's do."""
    while True:
        kinds = {each.kind for each in inspect.signature(model.forward).parameters.values()}
        children = list(model.children())
        if len(children) != 1 or not kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
            return model
        model = children[0]


def adapter_parts(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Modules that an adapter has put beside a layer, which are none of the model's."""
    if isinstance(getattr(module, "base_layer", None), torch.nn.Module):
        for name, child in module.named_children():
            if name != "base_layer":
                yield from child.modules()


def parts_of(name: str, linear: dict[str, torch.nn.Linear]) -> list[str]:
    """Layers in whose place one runs, where diffusers has fused them; the checkpoint has these."""
    path, _, own = name.removesuffix(".weight").rpartition(".")
    parts = [f"{path}.{part}.weight" for part in FUSED.get(own, ())]
    return parts if all(part in linear for part in parts) else []


def merged_weight(module: torch.nn.Linear, adapter: torch.nn.Module | None) -> torch.Tensor:
    """A layer's weight with the LoRAs that run beside it, as a checkpoint has it into which they are merged."""
    weight = module.weight
    offloaded = getattr(getattr(module, "_hf_hook", None), "weights_map", None)
    if weight.is_meta and offloaded is not None:
        weight = offloaded["weight"]  # of accelerate's offload, which brings it before the layer runs
    if adapter is None or adapter.merged or adapter.disable_adapters or not weight.is_floating_point():
        return weight
    deltas = [delta_of(adapter, each) for each in adapter.active_adapters if each in adapter.scaling]
    if weight.is_meta or any(each.is_meta for each in deltas):
        return weight.to("meta")
    return sum((each.to(weight.device) for each in deltas), weight)


def delta_of(adapter: torch.nn.Module, name: str) -> torch.Tensor:
    """What a LoRA adds to its layer's weight; of accelerate's offload, its parts are brought for that."""
    away = [
        part for part in adapter_parts(adapter)
        if hasattr(part, "_hf_hook") and any(each.is_meta for each in part.parameters(recurse=False))
    ]
    try:
        for part in away:
            part._hf_hook.pre_forward(part)
        return adapter.get_delta_weight(name)
    finally:
        for part in away:
            part._hf_hook.post_forward(part, None)


def samples_of(values: Iterable[object]) -> int:
    """Samples of a pass: the length of the first batch, a tensor or a list of them."""
    for each in values:
        if isinstance(each, torch.Tensor) and each.dim() > 1:
            return each.shape[0]
        if isinstance(each, (list, tuple)) and each and all(isinstance(part, torch.Tensor) for part in each):
            return len(each)
    return 1


def eagerly() -> AbstractContextManager:
    """No compiled code, which calls no hooks that come after it."""
    stance = getattr(torch.compiler, "set_stance", None)
    return nullcontext() if stance is None else stance("force_eager")


def is_experts(module: torch.nn.Module) -> bool:
    """Whether a module holds experts as transformers does: rows of gate and up, and down, in one parameter each."""
    both, last = (getattr(module, name, None) for name in ("gate_up_proj", "down_proj"))
    if not all(isinstance(each, torch.nn.Parameter) and each.dim() == 3 for each in (both, last)):
        return False
    return both.shape[1] == 2 * last.shape[2] and both.shape[2] == last.shape[1] and hasattr(module, "act_fn")


def expert_weights(
    path: str, module: torch.nn.Module, expert: int | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of experts by the names that checkpoints have for them, one by one."""
    for each in range(module.gate_up_proj.shape[0]) if expert is None else [expert]:
        gate, up = module.gate_up_proj[each].chunk(2, dim=0)
        parts = {"gate_proj": gate, "up_proj": up, "down_proj": module.down_proj[each]}
        yield from ((f"{path}.{each}.{part}.weight", weight) for part, weight in parts.items())


def is_tokens(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 2 and value.dtype in (torch.long, torch.int)


def sampled(weight: torch.Tensor, shape: list[int]) -> torch.Tensor | None:
    """Some weights, evenly spread from the first to the last; None where they are not plain numbers."""
    if not weight.is_floating_point() or weight.is_meta or list(weight.shape) != shape:
        return None
    flat = weight.detach().reshape(-1)
    places = [i * (flat.numel() - 1) // (MODEL_SAMPLES - 1) for i in range(MODEL_SAMPLES)]
    return flat[torch.tensor(places, device=flat.device)].float().cpu()


def block_rule(moment: str | int, widths: list[int]) -> Callable[[int], int]:
    if moment == "full":
        return lambda cols: cols
    if moment == "diagonal":
        return lambda cols: 1
    if moment == "auto":
        is_small = sum(4 * cols * cols for cols in widths) <= FULL_BYTES
        return lambda cols: cols if is_small else min(cols, DEFAULT_BLOCK)
    if isinstance(moment, int) and moment >= 1:
        return lambda cols: min(cols, moment)
    raise StatisticsError(f"moment must be auto, full, diagonal or the columns of a block, got {moment!r}")


def free_bytes(device: torch.device) -> float:
    """Half of what the device has free; what is not measured is not limited."""
    return torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else math.inf


def write_safetensors(
    path: Path, metadata: dict[str, str], tensors: list[tuple[str, torch.Tensor | Correlations]]
) -> None:
    """Writes tensors one after the other, in one step: a file of the name is replaced when the new one is whole."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    # The widest types first, as readers want numbers to lie on multiples of their size.
    tensors = sorted(tensors, key=lambda each: -each[1].element_size())
    for name, tensor in tensors:
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, tensor in tensors:
                own = tensor.detach().cpu().contiguous()
                if own.numel() > 0:
                    file.write((ctypes.c_char * (own.numel() * own.element_size())).from_address(own.data_ptr()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def collect(
    model: object,
    path: str | os.PathLike,
    *,
    name: str | None = None,
    source: str = "samples of PyTorch",
    synthetic: bool = False,
    layers: str = "",
    moment: str | int = "auto",
    precision: str = "float32",
    groups: int = 10,
    bins: int = 1000,
    time: Callable[..., object] | None = None,
    mask_token: int | None = None,
    pad_token: int | None = None,
    shift: int = 0,
    device_bytes: float | None = None,
) -> Iterator[Collector]:
    """Collects what the linear layers of a model read between the lines into a file.

    model        a module, or a diffusers pipeline, of which its transformer or unet is taken
    path         .safetensors; written when the block ends without an error
    source       what was run, for reports; `synthetic` where that is no real use of the model
    layers       a regular expression: only modules whose names match, for a pass of some layers at a time
    moment       auto, full, diagonal, or the columns of a block on the diagonal
    precision    of the moments in the file: float32, or float16 of their correlations, a quarter of its size
    groups       time groups, equal parts of the axis
    bins         timesteps, or steps of the mask ratio
    time         gets the arguments of a forward pass by name and returns its times; by default its timestep, or the
                 share of masks
    mask_token   of a masked language model; `pad_token` too, and `shift`: position i is predicted by the logits at
                 i - shift (Dream 1, LLaDA 0)
    device_bytes second moments on the model's device; what is more lies in files meanwhile. Default: half of what is
                 free there
    """
    module = model if isinstance(model, torch.nn.Module) else next(
        (each for key in ("transformer", "unet") if isinstance(each := getattr(model, key, None), torch.nn.Module)),
        None,
    )
    second = getattr(model, "transformer_2", None)
    if isinstance(second, torch.nn.Module) and second is not module:
        warnings.warn("only pipe.transformer is collected: collect pipe.transformer_2 in a second with block", stacklevel=3)
    if isinstance(module, torch.nn.DataParallel) and len(module.device_ids) > 1:
        raise StatisticsError(f"a model on one device is needed, got one on {len(module.device_ids)}: its .module")
    if module is None:
        raise StatisticsError(f"a model or a pipeline with a transformer or unet is needed, got {type(model).__name__}")
    path = Path(path)
    if path.suffix != ".safetensors" or not path.resolve().parent.is_dir():
        raise StatisticsError(f"a file named *.safetensors in a folder that is there is needed, got {path}")
    with tempfile.TemporaryDirectory(dir=path.resolve().parent, prefix=f".{path.name}.") as scratch:
        collector = Collector(
            module, name=name, source=source, synthetic=synthetic, layers=layers, moment=moment,
            precision=precision, groups=groups,
            bins=bins, time=time, mask_token=mask_token, pad_token=pad_token, shift=shift, device_bytes=device_bytes,
            scratch=scratch,
        )
        try:
            with collector_hooks(collector):
                yield collector
            try:
                collector.write(path)
            except OSError as error:
                raise StatisticsError(f"{path} cannot be written: {error.strerror}") from error
        finally:
            collector.inputs.clear()


@contextmanager
def collector_hooks(collector: Collector) -> Iterator[None]:
    try:
        collector.__enter__()
        with eagerly():
            yield
    finally:
        collector.remove()


def run_pipeline(options: argparse.Namespace, prompts: list[str]) -> None:
    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(options.model, torch_dtype=options.dtype).to(options.device)
    more = {} if options.steps is None else {"num_inference_steps": options.steps}
    with collect(pipe, options.out, source=f"{len(prompts)} prompts", moment=options.moment,
                 precision=options.precision):
        for i, prompt in enumerate(prompts):
            pipe(prompt, generator=torch.Generator("cpu").manual_seed(i), **more)


def run_language_model(options: argparse.Namespace, prompts: list[str]) -> None:
    import transformers

    loaded = dict(trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model, **loaded)
    config = transformers.AutoConfig.from_pretrained(options.model, **loaded)
    # The class that the checkpoint names; code of its own has it behind AutoModel.
    kind = getattr(transformers, (config.architectures or ["AutoModel"])[0], transformers.AutoModel)
    more = loaded if kind is transformers.AutoModel else {}
    model = kind.from_pretrained(options.model, dtype=options.dtype, **more)
    model = model.to(options.device).eval()
    mask = options.mask_token if options.mask_token is not None else tokenizer.mask_token_id
    if mask is None:
        raise StatisticsError("the tokenizer must have a mask token, got none: give --mask-token")
    shift = options.shift if options.shift is not None else int("dream" in model.config.model_type.lower())
    random = torch.Generator().manual_seed(0)
    with collect(model, options.out, source=f"{len(prompts)} texts", moment=options.moment,
                 precision=options.precision, mask_token=mask,
                 pad_token=tokenizer.pad_token_id, shift=shift), torch.no_grad():
        for prompt in prompts:
            tokens = tokenizer(prompt, return_tensors="pt").input_ids
            ratio = max(1e-3, torch.rand((), generator=random).item())
            masked = torch.rand(tokens.shape, generator=random) < ratio
            model(input_ids=tokens.masked_fill(masked, mask).to(options.device))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="collect_statistics.py",
        description="Runs a model over prompts and saves what its linear layers read.",
    )
    parser.add_argument("model", help="folder of a diffusers pipeline, or of a masked language model of transformers")
    parser.add_argument("out", help="the file to write, .safetensors")
    parser.add_argument("--prompts", required=True, help="a text file: a prompt, or a text to mask, a line")
    parser.add_argument("--steps", type=int, help="steps of a picture; default the pipeline's")
    parser.add_argument("--moment", default="auto", help="auto, full, diagonal or columns of a block")
    parser.add_argument("--precision", default="float32", help="of moments in the file: float32 or float16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16", help="of the model's weights as it runs; default bfloat16")
    parser.add_argument("--mask-token", type=int, help="number of the mask token; default the tokenizer's")
    parser.add_argument("--shift", type=int, help="1 where logits are of the next position, as Dream's are")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    options.moment = int(options.moment) if options.moment.isdigit() else options.moment
    prompts = [line.strip() for line in Path(options.prompts).read_text().splitlines() if line.strip()]
    if not prompts:
        raise StatisticsError(f"{options.prompts} must have a prompt a line, got none")
    run = run_pipeline if (Path(options.model) / "model_index.json").exists() else run_language_model
    run(options, prompts)


if __name__ == "__main__":
    try:
        main()
    except StatisticsError as error:
        sys.exit(f"error: {error}")
