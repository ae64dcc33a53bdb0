"""The configs of the blog's LLMs, so that plans and random weights need no network."""

from pathlib import Path

import transformers
import yaml

LLMS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())  # hub id: config keys


def blog_config(name: str) -> transformers.PretrainedConfig:
    """The config of one of LLMS, as its publisher has it."""
    return transformers.AutoConfig.for_model(**LLMS[name])
