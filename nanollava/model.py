"""The model: vision encoder, projector and LLM in a row, the loss, and what each stage trains.

    views -> encoder -> features -> projector -> pooling -> visual tokens -> LLM -> loss

With `pool_after_projector: false` pooling comes before the projector. Letters in shapes: N views,
T features of a view, C width of the encoder, D width of the LLM, V visual tokens and newlines, S
positions of a pack, K supervised tokens.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nanollava.anyres import Layout, Visual
from nanollava.encoder import ENCODERS, build
from nanollava.files import explain_failed_download
from nanollava.llm import load_llm, load_tokenizer
from nanollava.pooling import add_newlines, pool
from nanollava.projector import Projector
from nanollava.recipe import Recipe
from nanollava.sequence import Pack, Writer

# What a stage trains; the learned newline goes with the projector.
TRAIN = {
    "projector": ("projector", "newline"),
    "projector+llm": ("projector", "newline", "llm"),
    "full": ("encoder", "projector", "newline", "llm"),
}


def none_of(x: Tensor) -> Tensor:
    """An empty slice of (..., D), as (0, D), that keeps x in the graph: x gets a gradient of zero.

    During the backward pass DDP and FSDP wait on every process for a gradient of every parameter
    that trains. A process whose pack has no image, or no image with tiles, would leave some
    without one, and the run would hang. So every pack also runs the parts that it does not need,
    and takes zero rows of their output, which changes no number.
    """
    return x.flatten(0, -2)[:0]


class VLM(nn.Module):
    """Vision encoder, projector and LLM over packed documents."""

    def __init__(self, recipe: Recipe, weights: str = ""):
        super().__init__()
        self.recipe = recipe
        self.spec = ENCODERS[recipe.encoder]
        origin = f"{self.spec.hub or self.spec.open_clip}: {self.spec.published}"
        with explain_failed_download(origin, "encoder_weights"):
            self.encoder = build(self.spec, weights or recipe.encoder_weights)
        with explain_failed_download(recipe.llm, "llm"):
            self.llm = load_llm(recipe.llm, weights or recipe.llm_weights)
            self.tokenizer = load_tokenizer(recipe.llm)
        words = self.llm.get_input_embeddings().weight  # (vocabulary, D)
        dim = words.shape[1]
        # New tokens should be as large as words are. A model on "meta" has no numbers yet.
        rms = 1.0 if words.is_meta else words.detach().float().square().mean().sqrt().item()
        scale = rms if recipe.projector_norm else 0.0
        self.projector = Projector(self.spec.width, dim, recipe.connector, scale)
        self.newline = nn.Parameter(torch.randn(dim) * rms)

    def writer(self, visual: Visual | None = None, template: str = "") -> Writer:
        """What turns conversations and images into documents for this model."""
        return Writer(
            self.tokenizer,
            visual or self.recipe.visual,
            self.spec.tile,
            self.spec.side,
            template or self.recipe.template,
            self.recipe.label_mask,
            self.recipe.max_length,
        )

    def autocast(self) -> torch.autocast:
        """bf16 where the device computes in it; parameters and the loss stay float32.

        Autocast's cache of converted weights is off: it would hold a bf16 copy of every weight
        until the end of the forward pass, even of gathered shards and recomputed blocks.
        """
        device = self.newline.device.type
        # On other CPUs bf16 is emulated. The function is private to torch and may disappear.
        cpu_has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        bf16 = self.recipe.precision == "auto" and (device == "cuda" or cpu_has_bf16())
        return torch.autocast(device, torch.bfloat16, enabled=bf16, cache_enabled=False)

    def see(self, views: Tensor, layouts: tuple[Layout, ...]) -> Tensor:
        """uint8[N, 3, R, R], the views of all images -> visual tokens and newlines (V, D)."""
        projector_first = layouts[0].pool_after_projector
        features = self.encoder(views)  # (N, T, C)
        if projector_first:
            features = self.projector(features)  # (N, T, D)
        by_image = features.split([lay.views for lay in layouts])
        tokens = [
            pool(x, lay, lay.pooling, lay.arrange == "flat")  # (L, D), or (L, C)
            for x, lay in zip(by_image, layouts, strict=True)
        ]
        if not projector_first:  # one call for all images, then (L, D) per image again
            tokens = self.projector(torch.cat(tokens)).split([len(x) for x in tokens])
        ended = [add_newlines(x, lay, self.newline) for x, lay in zip(tokens, layouts, strict=True)]
        return torch.cat([*ended, none_of(self.newline[None])])  # (V, D)

    def see_nothing(self) -> Tensor:
        """The visual tokens of a pack without images, (0, D): none, but with gradients."""
        newline = none_of(self.newline[None])
        if not torch.is_grad_enabled():
            return newline
        R = self.spec.tile
        black = torch.zeros(1, 3, R, R, dtype=torch.uint8, device=newline.device)
        return torch.cat([none_of(self.projector(self.encoder(black))), newline])

    def embed(self, pack: Pack) -> Tensor:
        """The input of the LLM (1, S, D): words' embeddings, and visual tokens in their places."""
        words = self.llm.get_input_embeddings()(pack.ids)  # (S, D)
        visual = self.see(pack.views, pack.layouts) if pack.layouts else self.see_nothing()
        return words.index_copy(0, pack.visual, visual.to(words.dtype))[None]

    def read(self, embeds: Tensor, positions: Tensor, lengths: list[int], **keys) -> Tensor:
        """The LLM over packed documents: embeddings (1, S, D) -> hidden states (S, D).

        `keys` go to `packed_attention`: `packed_cache`, `packed_watch`.
        """
        return self.llm.model(
            inputs_embeds=embeds,
            position_ids=positions,
            # Nothing reads the mask, but to make one itself transformers 5 waits for the GPU.
            attention_mask=embeds.new_ones(1, 1, 1, 1),
            documents=lengths,
            use_cache=False,
            **keys,
        ).last_hidden_state[0]

    def forward(self, pack: Pack) -> Tensor:
        """A pack -> the cross-entropy of each supervised token in nats, float32[K].

        A pack without supervised tokens gives a single zero.
        """
        # Attention stays inside these documents; a lesson turns that off to show what is lost.
        lengths = list(pack.lengths) if self.recipe.isolate_documents else [len(pack.ids)]
        with self.autocast():
            # 1. Words become embeddings, views become visual tokens, each in its position.
            embeds = self.embed(pack)  # (1, S, D)
            # 2. The LLM reads all documents in one pass.
            hidden = self.read(embeds, pack.positions, lengths)  # (S, D)
            # 3. The lm_head runs only where the next token is supervised.
            logits = self.llm.lm_head(hidden[pack.predict])  # (K, vocabulary)
        losses = F.cross_entropy(logits.float(), pack.targets, reduction="none")  # (K,)
        # The mean of no losses would be nan. Their sum is 0, with a gradient for every parameter.
        return losses if len(losses) else losses.sum()[None]

    def set_trainable(self, train: str) -> dict[str, int]:
        """Freeze all but what a stage trains; returns {part: parameters that train}."""
        counts = dict.fromkeys(TRAIN["full"], 0)
        for name, parameter in self.named_parameters():
            part = name.split(".")[0]
            trains = part in TRAIN[train]
            parameter.requires_grad_(trains)
            counts[part] += parameter.numel() * trains
        return counts

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of both towers: what is sharded and recomputed as a unit."""
        return [*self.encoder.blocks, *self.llm.model.layers]

    def checkpoint_activations(self, on: bool) -> None:
        """Keep only each block's input, and compute the block again in the backward pass."""
        self.encoder.recompute(on)
        if on:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.llm.gradient_checkpointing_disable()

    def groups(self, lr: float, vision_lr: float, projector_lr: float, decay: float) -> list[dict]:
        """The optimizer's groups: encoder, projector with newline, LLM.

        Weight decay applies to matrices only, not to biases and norms.
        """
        rates = {"encoder": vision_lr, "projector": projector_lr, "newline": projector_lr}
        groups = {}  # (learning rate, weight decay) -> parameters
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                rate = rates.get(name.split(".")[0], lr)
                weight_decay = decay if parameter.ndim > 1 else 0.0
                groups.setdefault((rate, weight_decay), []).append(parameter)
        return [{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in groups.items()]
