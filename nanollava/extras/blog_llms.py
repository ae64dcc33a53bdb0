"""The sizes of the blog's LLMs, so that plans and random weights need no network."""

import transformers

# Width, blocks, heads, key-value heads, MLP width, vocabulary.
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


def blog_config(name: str) -> transformers.PretrainedConfig:
    """The config of one of LLMS, as its publisher has it."""
    width, blocks, heads, kv_heads, mlp_width, vocabulary = LLMS[name]
    qwen = name.startswith("Qwen")
    theta = 5e6 if "-4B-" in name else 1e6
    return transformers.AutoConfig.for_model(
        "qwen2" if qwen else "llama",
        hidden_size=width,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=mlp_width,
        vocab_size=vocabulary,
        max_position_embeddings=32768 if qwen else 4096,
        rope_theta=theta if qwen else 1e4,
        rms_norm_eps=1e-6 if qwen else 1e-5,
        tie_word_embeddings="-0.5B-" in name,
    )
