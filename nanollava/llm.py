"""The LLM: a pretrained decoder from transformers, and attention over packed documents.

A pack lays several documents end to end on S positions. Attention never crosses from one document
to the next, so one pass over the pack equals as many separate passes, and nothing is padded.
transformers calls `packed_attention` in every layer through its public interfaces. On the CPU it
runs one causal sdpa per document, on CUDA flash-attn's variable-length kernel if it is installed.

    query (1, H, S, d), key and value (1, H_kv, S, d)  ->  attended values (1, S, H, d)
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface

from nanollava.extras.blog_llms import LLMS, blog_config


class Cache:
    """The keys and values of several documents, one buffer per layer and document.

    Every buffer has its own size, so that documents of different lengths need no padding.
    """

    def __init__(self, capacities: Sequence[int]):
        self.capacities = list(capacities)  # the length that each document may reach
        self.lengths = [0] * len(capacities)  # how much of it is filled
        self.buffers: dict[int, list[Tensor]] = {}  # layer -> (2, H_kv, capacity, d) per document

    def extend(self, layer: int, pairs: Tensor, added: list[int]) -> list[Tensor]:
        """Append keys and values (2, H_kv, S, d), the i-th `added[i]` positions to document i.

        Returns the keys and values of each document so far, (2, H_kv, length, d).
        """
        if layer not in self.buffers:
            _, heads, _, d = pairs.shape
            self.buffers[layer] = [pairs.new_empty(2, heads, n, d) for n in self.capacities]
        filled = []
        new = pairs.split(added, 2)  # (2, H_kv, added, d) per document
        for buffer, start, x in zip(self.buffers[layer], self.lengths, new, strict=True):
            end = start + x.shape[2]
            buffer[:, :, start:end] = x
            filled.append(buffer[:, :, :end])
        return filled

    def advance(self, added: list[int]) -> None:
        """Count the added positions; call it once per forward pass, after its last layer."""
        self.lengths = [length + n for length, n in zip(self.lengths, added, strict=True)]

    def fork(self, sources: list[int], capacities: list[int], lengths: list[int]) -> "Cache":
        """A cache whose document i starts with `lengths[i]` positions of document `sources[i]`."""
        forked = Cache(capacities)
        for layer, buffers in self.buffers.items():
            starts = [buffers[i][:, :, :n] for i, n in zip(sources, lengths, strict=True)]
            forked.extend(layer, torch.cat(starts, dim=2), lengths)
        forked.advance(lengths)
        return forked


@cache
def flash_varlen():
    """flash-attn's variable-length kernel, or None if that optional package is not installed."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def one_document(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention of one document: query (H, q, d) over key and value (H_kv, k, d).

    The queries are the last q of the k positions.
    """
    q, k = query.shape[1], key.shape[1]
    groups = query.shape[0] // key.shape[0]
    if groups > 1:  # grouped-query attention: several heads share a key and a value
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    mask = None
    if 1 < q < k:
        # New tokens after a cached prefix. The causal triangle has to end at the lower right,
        # whereas sdpa's own starts at the upper left. A single token may look at everything.
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=1 < q == k, scale=scaling
    )[0]


def packed_flash(
    query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float | None
) -> Tensor:
    """`packed_attention` by flash-attn, which takes all documents of a pack in one call."""
    boundaries = torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    # Rotary embedding has made query and key float32; the kernel needs the values' 16 bits.
    q, k, v = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (S, H, d)
    return flash_varlen()(
        q, k, v, boundaries, boundaries, longest, longest, softmax_scale=scaling, causal=True
    )[None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    documents: list[int] | None = None,
    packed_cache: Cache | None = None,
    packed_watch: list[tuple[Tensor, Tensor]] | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """query (1, H, S, d), key and value (1, H_kv, S, d) -> attended values (1, S, H, d), None.

    `documents` holds the lengths of the packed documents, which add up to S. `packed_cache` holds
    what comes before them. `packed_watch` collects the query and key of every layer. The prefix
    keeps our keywords apart from those of transformers (5.24 passes a `cache` of its own).
    """
    if packed_watch is not None:
        packed_watch.append((query, key))
    lengths = documents or [query.shape[2]]
    half = query.is_cuda and value.dtype.itemsize == 2
    if half and packed_cache is None and flash_varlen():
        return packed_flash(query, key, value, lengths, scaling), None
    dtype = query.dtype
    if not query.is_cuda:  # the CPU's float32 kernel is faster than its bf16 one: 5x at 45 tokens
        query, key, value = query.float(), key.float(), value.float()
    if packed_cache is not None:
        new = torch.stack([key[0], value[0]])  # (2, H_kv, S, d)
        pairs = packed_cache.extend(module.layer_idx, new, lengths)
    else:
        pairs = zip(key[0].split(lengths, 1), value[0].split(lengths, 1), strict=True)
    # One sdpa call per document: a single call over the pack would need an S x S mask, and would
    # compute the scores between documents only to throw them away.
    outputs = []
    with torch.autocast("cpu", enabled=False):  # autocast would convert them to bf16 again
        for q, (k, v) in zip(query[0].split(lengths, 1), pairs, strict=True):
            outputs.append(one_document(q, k, v, scaling))  # (H, q, d)
    return torch.cat(outputs, dim=1).transpose(0, 1)[None].to(dtype), None


transformers.AttentionInterface.register("packed", packed_attention)
# The lengths of the documents say everything that a mask would say, so transformers builds none.
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)


def check_folder(name: str) -> None:
    """Raise FileNotFoundError for a local path without a config.json; hub ids pass."""
    local = name.startswith((".", "/", "~"))
    if local and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(
            f"llm: {name} has no config.json. Give a model's folder or a hub id"
        )


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerFast:
    """The fast tokenizer of a hub id or folder; the label mask is built from its offsets.

    Raises ValueError for a damaged tokenizer.json.
    """
    check_folder(name)
    own = (Path(name) / "tokenizer.json").is_file()
    # A folder's own file is read as it is: for some model types AutoTokenizer in transformers 5
    # would replace the rules that cut text into words.
    loader = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
    try:
        return loader.from_pretrained(name)
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises a bare Exception for a damaged file
            raise
        raise ValueError(f"{name}: damaged tokenizer.json: {error}. Copy it again.") from error


def config_of(name: str, random: bool = False) -> transformers.PretrainedConfig:
    """An LLM's config; for `random` weights the blog's LLMs need no network."""
    check_folder(name)
    if name not in LLMS or not random:
        return transformers.AutoConfig.from_pretrained(name)
    return blog_config(name)


def load_llm(name: str, weights: str = "published") -> transformers.PreTrainedModel:
    """A float32 causal LM with packed attention, with `published` or `random` weights.

    transformers reads safetensors where there are any, else the publisher's .bin, weights only.
    Raises ValueError for published weights of a model that is not an LLM alone.
    """
    config = config_of(name, random=weights == "random")
    llm_config = config.get_text_config()  # the LLM's part, if this is a vision-language model
    keys = {"config": llm_config, "attn_implementation": "packed"}
    if weights == "random":
        return transformers.AutoModelForCausalLM.from_config(**keys).float()
    if llm_config is not config:
        # Its tensors have other names, so transformers would leave the LLM's weights random.
        raise ValueError(f"llm: {name} is a {config.model_type}, not an LLM alone. Name its LLM")
    return transformers.AutoModelForCausalLM.from_pretrained(name, **keys, dtype=torch.float32)
