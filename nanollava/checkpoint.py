"""Checkpoints: a model's tensors to a run folder and back, also from shards.

A folder that holds model.safetensors is complete: the weights are written last.
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


def gather(model: VLM) -> dict[str, Tensor]:
    """All tensors of a model that is sharded over processes, on the first one's CPU; each calls."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    return get_model_state_dict(model, options=options)


def save(model: VLM, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
    """Write recipe.yaml, config.json, the tokenizer and, last, model.safetensors.

    `state`: the tensors, where the model itself holds only shards of them (`gather`).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_recipe(model.recipe, folder / "recipe.yaml")
    model.llm.config.to_json_file(folder / "config.json", use_diff=False)
    model.tokenizer.save_pretrained(folder)
    state = {k: v.contiguous() for k, v in (state or model.state_dict()).items()}
    if model.llm.config.tie_word_embeddings:
        state.pop("llm.lm_head.weight", None)
    with write_atomically(folder / "model.safetensors") as half:
        save_file(state, half, metadata={"format": "pt"})


def load(folder: str | Path, device: str = "cpu") -> VLM:
    """A run folder (or one stage of it), or a LlavaOnevision folder of transformers -> the model,
    ready to answer.

    Raises FileNotFoundError for a run without weights.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file() and not (folder / "recipe.yaml").is_file():
        keys, state = llava_onevision.read(folder)
        recipe = check(Recipe(**keys | {"visual": Visual(**keys["visual"])}))
    else:
        recipe = recipe_of(folder)
        state = load_tensors(folder / "model.safetensors")
    model = VLM(recipe, weights="random")
    fill(model, state, folder)
    if device.startswith("cuda") and recipe.precision == "auto":
        to_bf16(model.llm)  # once, where autocast would cast all of it for every token
    return model.eval().to(device)


def to_bf16(module: nn.Module) -> None:
    """Cast the parameters to bf16, and leave the buffers as they are.

    `module.bfloat16()` would round the rotary table `inv_freq` too: at 3,600 positions some phases
    of Qwen1.5-0.5B would then be off by up to 3.4 rad.
    """
    for p in module.parameters():
        p.data = p.data.bfloat16()


def recipe_of(run: Path) -> Recipe:
    """The recipe of a run folder; raises FileNotFoundError where the folder is no whole one."""
    if not (run / "model.safetensors").is_file():
        found = sorted(str(p.parent) for p in run.glob("*/model.safetensors"))
        raise FileNotFoundError(
            f"{run} has no model.safetensors: train first, or give one of {found or 'your runs'}"
        )
    for name in ("recipe.yaml", "config.json", "tokenizer.json"):
        if not (run / name).is_file():
            raise FileNotFoundError(f"{run} has weights but no {name}: it is no whole run folder")
    return read_recipe(run / "recipe.yaml", llm=str(run))


def load_weights(model: VLM, file: str | Path) -> None:
    """Fill a model from a safetensors file."""
    fill(model, load_tensors(file), file)


def fill(model: VLM, state: dict[str, Tensor], source: str | Path) -> None:
    """Tensors into a model; names both shapes where they do not fit."""
    own = model.state_dict()
    for name, tensor in state.items():
        if name in own and own[name].shape != tensor.shape:
            raise ValueError(
                f"{source}: {name} is {tuple(tensor.shape)}, but encoder {model.recipe.encoder} "
                f"with llm {model.recipe.llm} needs {tuple(own[name].shape)}"
            )
    missing, extra = model.load_state_dict(state, strict=False)
    if model.llm.config.tie_word_embeddings:
        missing = [n for n in missing if n != "llm.lm_head.weight"]
    if missing or extra:
        raise ValueError(f"{source}: missing {missing[:3]}, not of this model {extra[:3]}")
