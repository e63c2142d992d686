# SPDX-License-Identifier: Apache-2.0
"""On which devices one block is computed.

One device is the rule. With several, the block's Linear, Conv1D and fused experts (all of a block together) are spread by
accelerate's hooks, which move a layer's input to the layer and its output back; the block's own arithmetic stays on the main
device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_autoround.errors import AutoRoundError, UnknownName
from hf_autoround.models.experts import fused_experts
from hf_autoround.registry import suggest

DeviceMap = str | int | torch.device | Sequence[int | str] | Mapping[str, int | str] | None


@dataclass(frozen=True)
class Placement:
    """The main device, further devices to share a block with, and name patterns that override the sharing."""

    main: torch.device
    others: tuple[torch.device, ...] = ()
    patterns: tuple[tuple[str, torch.device], ...] = ()

    def spread(self, block_name: str, block: nn.Module) -> None:
        """Hook the block's layers to their devices; parameters move there. Nothing happens with one device."""
        for name, device in self._assign(block_name, block).items():
            hook = AlignDevicesHook(execution_device=device, io_same_device=True, place_submodules=True)
            add_hook_to_module(block.get_submodule(name), hook)

    def gather(self, block: nn.Module) -> None:
        """Take the hooks off again."""
        if self.others or self.patterns:
            remove_hook_from_submodules(block)

    def refuse_patterns(self, model: nn.Module, block_names: Iterable[str]) -> None:
        """Raise UnknownName for a pattern that matches no layer of any block."""
        names = [f"{block}.{name}" for block in block_names for name in _layers(model.get_submodule(block))]
        for pattern, _ in self.patterns:
            if not any(re.search(pattern, name) for name in names):
                tails = {part for name in names for part in (name, name.rpartition(".")[2])}
                hint = suggest(pattern, tails) or f"; layer names look like {names[0]}"
                raise UnknownName(
                    f"device_map: {pattern!r} matches no layer of a block, and everything else is on the main device, "
                    f'which the key "" names{hint}'
                )

    def _assign(self, block_name: str, block: nn.Module) -> dict[str, torch.device]:
        sizes, chosen = _layers(block), {}
        for name in sizes:
            for pattern, device in self.patterns:
                if re.search(pattern, f"{block_name}.{name}"):
                    chosen[name] = device
                    break
        if self.others:  # largest first, each to the device that has least so far; the main one carries activations too
            load = dict.fromkeys((self.main, *self.others), 0)
            for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
                if name not in chosen:
                    chosen[name] = min((*self.others, self.main), key=load.__getitem__)
                load[chosen[name]] = load.get(chosen[name], 0) + size
        return {name: device for name, device in chosen.items() if device != self.main}


def _layers(block: nn.Module) -> dict[str, int]:
    """Return the layers that can be on a device of their own, by name, and how many weights each has."""
    layers = [(name, module) for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    return {name: sum(weight.numel() for weight in module.parameters()) for name, module in [*layers, *fused_experts(block)]}


def resolve_placement(device_map: DeviceMap, own: torch.device | None = None) -> Placement:
    """Return the devices that a user means: None or "auto" (every accelerator, or the CPU), an index, "cuda:1", "0,1", a
    list, or a dict of name patterns (regular expressions; the key "" is the main device). `own` is the device that a
    launcher gave to this process, one of several: then it can only mean that.

    Raises AutoRoundError for a device that this machine does not have, or that is not this process' own, UnknownName for
    what is no pattern.
    """
    if own is not None:
        if isinstance(device_map, Mapping | list | tuple) or str(device_map) not in ("None", "auto", own.type):
            raise AutoRoundError(
                f"device_map={device_map!r} with several processes: each works on the device that its launcher gave it; "
                "leave device_map out, or start one process to spread blocks over devices"
            )
        return Placement(own)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if isinstance(device_map, Mapping):
        patterns = {pattern: _device(device, accelerator) for pattern, device in device_map.items()}
        for pattern in patterns:
            _refuse_syntax(pattern)
        main = patterns.pop("", None) or _device(0 if accelerator else "cpu", accelerator)
        return Placement(main, patterns=tuple(patterns.items()))
    if isinstance(device_map, str) and "," in device_map:
        device_map = [part.strip() for part in device_map.split(",")]
    if device_map is None or device_map == "auto":
        if accelerator is None:
            return Placement(torch.device("cpu"))
        count = torch.accelerator.device_count() if device_map == "auto" else 1
        devices = [torch.device(accelerator.type, index) for index in range(count)]
    elif isinstance(device_map, str | int | torch.device):
        devices = [_device(device_map, accelerator)]
    else:
        devices = [_device(device, accelerator) for device in device_map]
    if not devices:
        raise AutoRoundError('device_map is an empty list; give a device, "auto" or nothing')
    return Placement(devices[0], tuple(devices[1:]))


def _refuse_syntax(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UnknownName(
            f"device_map: {pattern!r} is no regular expression ({error}); a part of a layer's name is one, .* stands for anything"
        ) from error


def _device(name: int | str | torch.device, accelerator: torch.device | None) -> torch.device:
    if isinstance(name, int) or (isinstance(name, str) and name.isdigit()):
        if accelerator is None:
            if int(name) == 0:  # "the first device": without an accelerator that is the CPU
                return torch.device("cpu")
            raise AutoRoundError(f"device_map names device {name}, but this machine has no accelerator; use cpu")
        name = f"{accelerator.type}:{name}"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise AutoRoundError(f"device_map names {name!r}, which is no device; use cpu, cuda:0, an index or auto") from error
    if device.type != "cpu" and (accelerator is None or device.type != accelerator.type):
        raise AutoRoundError(f"device_map names {name}, but this machine has no {device.type} device; use cpu")
    if device.index is not None and device.type != "cpu" and device.index >= torch.accelerator.device_count():
        raise AutoRoundError(f"device_map names {name}, but there are {torch.accelerator.device_count()} such devices")
    return device
