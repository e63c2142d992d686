# SPDX-License-Identifier: Apache-2.0
"""Calibration text that the float model writes itself.

What a model says is what it was trained on, as far as it remembers: text without a data set. It also keeps end-to-end
tuning from over-fitting, which needs more rows than most users have at hand (LLM-QAT, https://arxiv.org/abs/2305.17888).

A row begins with the begin-of-text token and the first tokens of a row of data; without data, with tokens drawn at twice the
temperature, since texts begin much alike. It never ends: the token that would end it is not drawn. (tinystories, W2A16G32,
50 steps a block, KL on text never seen, mean of two seeds. 128 sampled rows: 0.556 if they begin with the begin-of-text
token alone, 0.516 with a hot beginning. 128 of data and 128 sampled: 0.463, and 0.471 if texts end and others begin.)

Each token is found by inverting the cumulative distribution at one uniform number, drawn beforehand for each place of each
row: the text depends on the seed alone, not on how rows are batched or on a device's generator, and nobody's random state
is touched.

The whole model has to be in memory meanwhile, which tuning block by block does not need: a token takes a walk over all
blocks, far too many for weights that come from disk.

Shapes: N rows, B rows of a batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod

import torch
from accelerate.utils import get_max_memory
from torch import Tensor
from transformers import GenerationConfig

from hf_autoround.calibration.batches import SampledText
from hf_autoround.errors import CalibrationError, CheckpointError
from hf_autoround.models.attention import use_chunked_attention
from hf_autoround.models.blocks import ModelParts
from hf_autoround.models.cache import room_for
from hf_autoround.models.loading import LazyModel, evict, load_keys
from hf_autoround.models.memory import release_memory
from hf_autoround.models.placement import Placement

_ROWS = 512  # at a time: on a CPU 512 x 256 tokens of tinystories take 11.3 s with 128, 9.6 with 256, 8.3 with 512
_CACHE = 4 << 30  # bytes of keys, values and predictions; on CUDA a quarter of the memory
_SMALL = 4 << 30  # bytes of weights that a CPU holds in float32, in which it is faster than in bfloat16 (28 s against 55)


def refuse_sampling(lazy: LazyModel, seqlen: int, placement: Placement) -> str | None:
    """Say why this model cannot be sampled from: "the model cannot ...", or nothing if it can."""
    if not lazy.model.can_generate():
        return f"{type(lazy.model).__name__} cannot generate text"
    needed = _weights(lazy, sampling_dtype(lazy, placement.main)) + _row_bytes(lazy, seqlen, placement)
    free = _free(placement)
    if free is not None and needed > free:
        where = ", ".join(map(str, (placement.main, *placement.others)))
        return f"the whole model has to be in memory for that: it needs {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB"
    return None


def sampling_dtype(lazy: LazyModel, device: torch.device) -> torch.dtype:
    """Return the dtype in which text is sampled: the stored one, but float32 on a CPU if the model is small."""
    stored = next(entry.dtype for entry in lazy.checkpoint.entries.values() if entry.dtype.is_floating_point)
    if device.type != "cpu" or stored == torch.float64:
        return stored
    if _weights(lazy, torch.float32) <= _SMALL:
        return torch.float32
    return torch.bfloat16 if stored == torch.float16 else stored  # whose products a CPU has no instruction for


@torch.no_grad()
def sample_text(
    lazy: LazyModel,
    parts: ModelParts,
    request: SampledText,
    prompts: Tensor,
    placement: Placement,
    on_step: Callable[[int], None] = lambda tokens: None,
) -> Tensor:
    """Return (N, T) tokens as requested; `prompts` (M, T) are rows of data, none or many. `on_step` is told how many
    tokens were added.

    The model's weights are loaded for that and evicted again. Raises CalibrationError if it predicts no finite numbers.
    """
    dtype = sampling_dtype(lazy, placement.main)
    random = torch.Generator().manual_seed(request.seed)
    uniform = torch.rand((request.num, request.seqlen), dtype=torch.float64, generator=random)
    start, ends = _start_and_ends(lazy, request)
    beginnings = _beginnings(lazy, request, start, prompts, random)
    rows, hot = _batch_size(lazy, request, placement), 0 if len(prompts) else request.prompt
    never = torch.tensor(ends, dtype=torch.int64, device=placement.main)
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(lazy.model.forward).parameters else {}
    sampled = []
    with _whole(lazy, parts, placement, dtype):
        for batch in torch.arange(request.num).split(rows):
            new, drawn = beginnings[batch].to(placement.main), uniform[batch].to(placement.main)
            texts, cache = [new], room_for(lazy.model, request.seqlen)
            on_step(new.numel())
            for place in range(new.shape[1], request.seqlen):
                logits = lazy.model(input_ids=new, use_cache=True, **last, **cache).logits[:, -1]
                logits = logits.to(placement.main, torch.float32).index_fill_(1, never, float("-inf"))
                new = _draw(logits, drawn[:, place, None], request.temperature * (2 if place <= hot else 1))
                texts.append(new)
                on_step(len(new))
            sampled.append(torch.cat(texts, 1).cpu())
    return torch.cat(sampled)


def _draw(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """Return the token of each row (B, 1) at which the cumulative distribution of `logits` (B, V) passes `uniform` (B, 1)."""
    # in float64: the order in which a GPU adds does not show
    below = (logits if temperature == 1 else logits / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    if not torch.isfinite(below[:, -1]).all():
        raise CalibrationError(
            "the float model's predictions hold NaN or infinity, so no text can be sampled from it; its weights are damaged"
        )
    return torch.searchsorted(below, uniform * below[:, -1:], right=True).clamp_(max=logits.shape[-1] - 1)


@contextmanager
def _whole(lazy: LazyModel, parts: ModelParts, placement: Placement, dtype: torch.dtype) -> Iterator[None]:
    """Have every weight in memory for the duration of a `with`, and attention that is fast for one token at a time."""
    inside, attention = tuple(f"{name}." for name in parts.block_names), lazy.model.config._attn_implementation
    try:
        if placement.main.type == "cpu":
            use_chunked_attention(lazy.model)
        load_keys(lazy, [key for key, name in lazy.keys.items() if not name.startswith(inside)], placement.main, dtype)
        for name in parts.block_names:
            load_keys(lazy, lazy.keys_under(name), placement.main, dtype)
            placement.spread(name, lazy.model.get_submodule(name))
        for name, parameter in lazy.model.named_parameters():
            if parameter.device.type == "meta":
                raise CheckpointError(f"{lazy.name} holds no tensor for {name}")
        yield
    finally:
        if lazy.model.config._attn_implementation != attention:
            lazy.model.set_attn_implementation(attention)
        placement.gather(lazy.model)
        evict(lazy.model)
        lazy.model.tie_weights()
        release_memory()


def _start_and_ends(lazy: LazyModel, request: SampledText) -> tuple[int | None, tuple[int, ...]]:
    """Return the token that a text begins with, and those that end one.

    A model without a begin-of-text token begins with the one that ends texts, as it came before each text in training; one
    that has neither gives None.
    """
    config, folder = lazy.model.config.get_text_config(), lazy.checkpoint.folder
    generation = lazy.model.generation_config
    if folder is not None and (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
    ends = [*_as_tuple(config.eos_token_id), *_as_tuple(generation.eos_token_id)]
    known = [request.start, config.bos_token_id, generation.bos_token_id, *ends]
    start = next((token for token in known if token is not None and token < config.vocab_size), None)
    return start, tuple(token for token in ends if token < config.vocab_size)


def _as_tuple(tokens: int | list[int] | None) -> tuple[int, ...]:
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)


def _beginnings(lazy: LazyModel, request: SampledText, start: int | None, prompts: Tensor, random: torch.Generator) -> Tensor:
    """Return how each row begins (N, P): with `start`, or a token at random, then the first tokens of a row of data."""
    starts = torch.full((request.num, 1), -1 if start is None else start)
    if start is None:
        starts = torch.randint(lazy.model.config.get_text_config().vocab_size, (request.num, 1), generator=random)
    if not len(prompts):
        return starts
    order = torch.cat([torch.randperm(len(prompts), generator=random) for _ in range(-(-request.num // len(prompts)))])
    chosen = prompts[order[: request.num]]
    shift = (chosen[:, :1] == starts).long()  # a row that begins a text has that token already
    return torch.cat([starts, chosen.gather(1, shift + torch.arange(request.prompt))], 1)


def _weights(lazy: LazyModel, dtype: torch.dtype) -> int:
    """Return the bytes of the model's weights in a dtype."""
    return sum(prod(entry.shape) * dtype.itemsize for entry in lazy.checkpoint.entries.values())


def _row_bytes(lazy: LazyModel, seqlen: int, placement: Placement) -> int:
    """Return the bytes of a row's predictions, and of its keys and values in all blocks, or a little more (sliding windows
    keep less)."""
    config = lazy.model.config.get_text_config()
    heads = config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    width = (getattr(config, "num_key_value_heads", None) or heads) * size
    predictions = 32 * config.vocab_size  # logits, probabilities and their sums in float64, with room for copies
    return 2 * config.num_hidden_layers * width * seqlen * sampling_dtype(lazy, placement.main).itemsize + predictions


def _batch_size(lazy: LazyModel, request: SampledText, placement: Placement) -> int:
    budget = torch.cuda.get_device_properties(placement.main).total_memory // 4 if placement.main.type == "cuda" else _CACHE
    free = _free(placement)
    if free is not None:
        budget = min(budget, free - _weights(lazy, sampling_dtype(lazy, placement.main)))
    return max(1, min(_ROWS, budget // _row_bytes(lazy, request.seqlen, placement)))


def _free(placement: Placement) -> int | None:
    """Return the free bytes of the devices together, None if it is not known."""
    free = get_max_memory()
    keys = ["cpu" if device.type == "cpu" else device.index or 0 for device in {placement.main, *placement.others}]
    return sum(free[key] for key in keys) if all(key in free for key in keys) else None
