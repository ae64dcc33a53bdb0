"""The LLM: a pretrained decoder from transformers, and attention over packed documents.

A row of S positions holds several documents one after another. Attention never crosses from one
to the next, so a packed row equals as many separate forward passes, and nothing is ever padded.
`packed_attention` is registered through transformers' public interfaces; on the CPU it runs one
causal sdpa per document, on CUDA flash-attn's variable-length kernel where that is installed.
"""

from collections.abc import Sequence
from functools import cache as cached
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.masking_utils import AttentionMaskInterface

# The blog's LLMs, so that `plan` needs no network: width, blocks, heads, key-value heads, MLP
# width, vocabulary.
LLMS = {
    "Qwen/Qwen1.5-0.5B-Chat": (1024, 24, 16, 16, 2816, 151936),
    "Qwen/Qwen1.5-1.8B-Chat": (2048, 24, 16, 16, 5504, 151936),
    "Qwen/Qwen1.5-4B-Chat": (2560, 40, 20, 20, 6912, 151936),
    "Qwen/Qwen1.5-7B-Chat": (4096, 32, 32, 32, 11008, 151936),
    "Qwen/Qwen1.5-14B-Chat": (5120, 40, 40, 40, 13696, 152064),
    "Qwen/Qwen1.5-32B-Chat": (5120, 64, 40, 8, 27392, 152064),
    "Qwen/Qwen1.5-72B-Chat": (8192, 80, 64, 64, 24576, 152064),
    "Qwen/Qwen1.5-110B-Chat": (8192, 80, 64, 8, 49152, 152064),
    "lmsys/vicuna-7b-v1.5": (4096, 32, 32, 32, 11008, 32000),
}


class Cache:
    """Keys and values of several documents, a buffer each, so that generation pads nothing.

    `room[i]` is the length that document i may reach; `used[i]` how much of it is filled.
    """

    def __init__(self, room: Sequence[int]):
        self.room, self.used = list(room), [0] * len(room)
        self.buffers: dict[int, list[Tensor]] = {}  # layer -> per document (2, H, room, d)

    def extend(self, layer: int, key: Tensor, value: Tensor, lengths: list[int]) -> list[Tensor]:
        """Append (H, S, d) of packed documents; returns each one's (2, H, length, d) so far."""
        news = torch.stack([key, value]).split(lengths, 2)  # (2, H, S, d)
        if layer not in self.buffers:
            H, _, d = key.shape
            self.buffers[layer] = [key.new_empty(2, H, n, d) for n in self.room]
        out = []
        for buffer, start, new in zip(self.buffers[layer], self.used, news, strict=True):
            out.append(buffer[:, :, : start + new.shape[2]])
            out[-1][:, :, start:] = new
        return out

    def advance(self, lengths: list[int]) -> None:
        """Call once after a forward pass over all layers."""
        self.used = [u + n for u, n in zip(self.used, lengths, strict=True)]

    def fork(self, of: Sequence[int], room: Sequence[int], used: Sequence[int]) -> "Cache":
        """A cache of other documents: each begins with the first `used` positions of one here."""
        new, parts = Cache(room), [*zip(of, room, used, strict=True)]
        new.used = [*used]
        for layer, old in self.buffers.items():
            _, H, _, d = old[0].shape
            new.buffers[layer] = [old[i].new_empty(2, H, most, d) for i, most, _ in parts]
            for buffer, (i, _, n) in zip(new.buffers[layer], parts, strict=True):
                buffer[:, :, :n] = old[i][:, :, :n]
        return new


@cached
def flash_varlen():
    """flash-attn's variable-length kernel, or None: an optional extra, looked for at first use."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def one_document(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Causal attention of one document, (H, q, d) over (H, k, d): the q last of k positions."""
    q, k = query.shape[1], key.shape[1]
    mask = None
    if 1 < q < k:  # new tokens after a cached prefix: the causal triangle ends at the lower right
        mask = torch.ones(q, k, dtype=torch.bool, device=query.device).tril(k - q)
    return F.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=mask, is_causal=1 < q == k, scale=scale
    )[0]


def packed_flash(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float):
    """`packed_attention` by flash-attn; rotary embedding has made query and key float32."""
    ends = torch.tensor([0, *lengths], device=query.device).cumsum(0, dtype=torch.int32)
    rows = (x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value))  # (S, H, d)
    most = max(lengths)
    return flash_varlen()(*rows, ends, ends, most, most, softmax_scale=scaling, causal=True)[None]


def packed_attention(
    module: nn.Module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    documents=None,
    packed_cache=None,
    packed_watch=None,
    **_,
):
    """query (1, H, S, d), key and value (1, H_kv, S, d) -> (1, S, H, d), None.

    `documents`: the lengths of the packed documents, which add up to S; `packed_cache`: their
    `Cache`, if any; `packed_watch`: a list that is to get each layer's query and key. transformers
    hands over keywords of its own beside these (5.24: its own `cache`), so ours have a prefix.
    """
    if packed_watch is not None:
        packed_watch.append((query, key))
    groups = query.shape[1] // key.shape[1]
    lengths = documents or [query.shape[2]]
    if query.is_cuda and packed_cache is None and value.dtype.itemsize == 2 and flash_varlen():
        return packed_flash(query, key, value, lengths, scaling), None
    dtype = query.dtype
    if not query.is_cuda:  # the CPU's float32 kernel is faster than its bf16 one: 5x at 45 tokens
        query, key, value = query.float(), key.float(), value.float()
    if packed_cache is not None:
        pairs = packed_cache.extend(module.layer_idx, key[0], value[0], lengths)
    else:
        pairs = list(zip(key[0].split(lengths, 1), value[0].split(lengths, 1), strict=True))
    with torch.autocast("cpu", enabled=False):  # it would make them bf16 again
        out = [
            one_document(
                q, *(x.repeat_interleave(groups, 0) if groups > 1 else x for x in kv), scaling
            )
            for q, kv in zip(query[0].split(lengths, 1), pairs, strict=True)
        ]
    return torch.cat(out, dim=1).transpose(0, 1)[None].to(dtype), None


transformers.AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", lambda *args, **kwargs: None)  # documents need no mask


def _local(name: str) -> None:
    """A folder that should be there must be: a hub id has no leading dot or slash."""
    if name.startswith((".", "/", "~")) and not (Path(name) / "config.json").is_file():
        raise FileNotFoundError(f"llm: {name} has no config.json; give a whole folder or a hub id")


def load_tokenizer(name: str):
    """The fast tokenizer of a hub id or folder (offsets are what the label mask is built from).

    A folder's tokenizer.json is taken as it is: transformers 5 would replace the way it cuts words
    by that of config.json's model type.
    """
    _local(name)
    own = (Path(name) / "tokenizer.json").is_file()
    kind = transformers.PreTrainedTokenizerFast if own else transformers.AutoTokenizer
    try:
        return kind.from_pretrained(name)
    except Exception as error:
        if type(error) is not Exception:  # which tokenizers raises for a damaged file
            raise
        raise ValueError(f"{name}: damaged tokenizer.json: {error}") from error


def config_of(name: str, random: bool = False) -> transformers.PretrainedConfig:
    """An LLM's config; for `random` weights the blog's LLMs need no network."""
    _local(name)
    if random and name in LLMS:
        width, blocks, heads, kv_heads, ffn, words = LLMS[name]
        qwen = name.startswith("Qwen")
        kind, theta, length = ("qwen2", 1e6, 32768) if qwen else ("llama", 1e4, 4096)
        return transformers.AutoConfig.for_model(
            kind,
            hidden_size=width,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            intermediate_size=ffn,
            vocab_size=words,
            max_position_embeddings=length,
            rope_theta=5e6 if "-4B-" in name else theta,
            rms_norm_eps=1e-6 if qwen else 1e-5,
            tie_word_embeddings="-0.5B-" in name,
        )
    return transformers.AutoConfig.from_pretrained(name)


def load_llm(name: str, weights: str = "published"):
    """A float32 causal LM with packed attention: `published` weights, or `random` ones.

    Safetensors where there are any; else transformers reads the publisher's .bin, weights only.
    """
    whole, kind = config_of(name, weights == "random"), transformers.AutoModelForCausalLM
    config = whole.get_text_config()  # its own object: the attention is set in it
    keys = {"config": config, "attn_implementation": "packed"}
    if weights == "random":
        return kind.from_config(**keys).float()
    if config is not whole:  # its weights have other names: the LLM would stay random
        raise ValueError(f"llm: {name} is a {whole.model_type}, not an LLM alone; give an LLM")
    return kind.from_pretrained(name, **keys, dtype=torch.float32)
