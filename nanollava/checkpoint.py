"""Checkpoints: a model's tensors to a run folder and back, also when they are sharded.

A folder that holds model.safetensors is complete, because the weights are written last.
"""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nanollava.anyres import Visual
from nanollava.files import load_tensors, write_atomically
from nanollava.hf import llava_onevision
from nanollava.model import VLM
from nanollava.recipe import Recipe, check, read_recipe, write_recipe

LM_HEAD = "llm.lm_head.weight"  # a tied LLM has it as the embeddings' second name


def gather(model: VLM) -> dict[str, Tensor]:
    """All tensors of a sharded model, on the CPU of the first process; every process calls this."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def save(model: VLM, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write recipe.yaml, config.json, the tokenizer and, last, model.safetensors.

    `state` holds the tensors of a model that is sharded (see `gather`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # 1. What describes the model.
    write_recipe(model.recipe, folder / "recipe.yaml")
    model.llm.config.to_json_file(folder / "config.json", use_diff=False)
    model.tokenizer.save_pretrained(folder)
    # 2. The weights, under their own name only when the file is complete.
    state = state or model.state_dict()
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    if model.llm.config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)  # safetensors refuses two names for the same memory
    with write_atomically(folder / "model.safetensors") as half:
        save_file(tensors, half, metadata={"format": "pt"})


def load(folder: str | Path, device: str = "cpu") -> VLM:
    """A model, ready to answer, from a run folder, one of its stages or a LlavaOnevision folder.

    Raises FileNotFoundError for an incomplete folder and ValueError for tensors that do not fit.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and not (folder / "recipe.yaml").is_file():
        keys, state = llava_onevision.read(folder)  # a folder that transformers can read
        visual = Visual(**keys["visual"])
        recipe = check(Recipe(**keys | {"visual": visual}))
    else:
        recipe = recipe_of(folder)
        state = load_tensors(folder / "model.safetensors")
    model = VLM(recipe, weights="random")  # published ones would be overwritten below
    fill(model, state, folder)
    if device.startswith("cuda") and recipe.precision == "auto":
        to_bf16(model.llm)  # once, whereas autocast would convert every weight for every token
    return model.eval().to(device)


def to_bf16(module: nn.Module) -> None:
    """Convert the parameters to bf16, and leave the buffers as they are.

    `module.bfloat16()` would round the rotary table `inv_freq` too: at 3,600 positions some phases
    of Qwen1.5-0.5B would then be off by up to 3.4 rad.
    """
    for parameter in module.parameters():
        parameter.data = parameter.data.bfloat16()


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder; raises FileNotFoundError for an incomplete folder."""
    files = ("model.safetensors", "recipe.yaml", "config.json", "tokenizer.json")
    missing = [name for name in files if not (run / name).is_file()]
    if missing:
        finished = sorted(str(file.parent) for file in run.glob("*/model.safetensors"))
        raise FileNotFoundError(
            f"{run} has no {', '.join(missing)}; expected a finished run or one of its stages. "
            f"Train first, or give one of {finished or 'your runs'}."
        )
    return read_recipe(run / "recipe.yaml", llm=str(run))


def load_weights(model: VLM, file: str | Path) -> None:
    """Fill a model from a safetensors file."""
    fill(model, load_tensors(file), file)


def fill(model: VLM, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy tensors into a model; raises ValueError, naming those that do not fit."""
    own = model.state_dict()
    if model.llm.config.tie_word_embeddings:
        state = {LM_HEAD: own[LM_HEAD], **state}  # a tied lm_head may be left out
    expected, given = shapes(own), shapes(state)
    if given != expected:  # name what is only in the file, and what is only in the model
        raise ValueError(
            f"{source} has {sorted(given - expected)[:3]}, but encoder {model.recipe.encoder} "
            f"with llm {model.recipe.llm} needs {sorted(expected - given)[:3]}. "
            "Give weights and a recipe that belong together."
        )
    model.load_state_dict(state)


def shapes(state: dict[str, Tensor]) -> set[tuple]:
    """The (name, shape) of each tensor."""
    return {(name, tuple(tensor.shape)) for name, tensor in state.items()}
