"""The model: the parts in a row, the loss, what trains.

    views -> encoder -> features -> projector -> pooling -> visual tokens -> LLM -> loss

`pool_after_projector: false` swaps projector and pooling.
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


class VLM(nn.Module):
    """Vision encoder, projector and LLM over packed rows."""

    def __init__(self, recipe: Recipe, weights: str = ""):
        super().__init__()
        self.recipe, self.spec = recipe, ENCODERS[recipe.encoder]
        origin = f"{self.spec.hub or self.spec.open_clip}: {self.spec.published}"
        with explain_failed_download(origin, "encoder_weights"):
            self.encoder = build(self.spec, weights or recipe.encoder_weights)
        with explain_failed_download(recipe.llm, "llm"):
            self.llm = load_llm(recipe.llm, weights or recipe.llm_weights)
            self.tokenizer = load_tokenizer(recipe.llm)
        words = self.llm.get_input_embeddings().weight
        rms = 1.0 if words.is_meta else words.detach().float().square().mean().sqrt().item()
        dim, scale = words.shape[1], rms if recipe.projector_norm else 0.0
        self.projector = Projector(self.spec.width, dim, recipe.connector, scale)
        self.newline = nn.Parameter(torch.randn(dim) * rms)

    def writer(self, visual: Visual | None = None, template: str = "") -> Writer:
        """What turns conversations and images into documents for this model."""
        keys = self.recipe
        return Writer(
            self.tokenizer,
            visual or keys.visual,
            self.spec.tile,
            self.spec.side,
            template or keys.template,
            keys.label_mask,
            keys.max_length,
        )

    def autocast(self) -> torch.autocast:
        """bf16 where the device computes in it; parameters and the loss stay float32.

        Without the cache of casts, which would keep a bf16 copy of every weight until the end of
        the forward pass, gathered shards and blocks that are recomputed among them.
        """
        kind = self.newline.device.type
        able = kind == "cuda" or getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
        able = able and self.recipe.precision == "auto"
        return torch.autocast(kind, torch.bfloat16, enabled=able, cache_enabled=False)

    def see(self, views: Tensor, layouts: tuple[Layout, ...]) -> Tensor:
        """uint8[N, 3, R, R], the views of all images -> visual tokens and newlines (V, D)."""
        after = layouts[0].pool_after_projector
        x = self.encoder(views)  # (N, T, C)
        if after:
            x = self.projector(x)  # (N, T, D)
        images = x.split([lay.views for lay in layouts])
        images = [
            pool(f, lay, lay.pooling, lay.arrange == "flat")
            for f, lay in zip(images, layouts, strict=True)
        ]
        if not after:
            lengths = [len(x) for x in images]
            images = self.projector(torch.cat(images)).split(lengths)
        rows = [add_newlines(x, lay, self.newline) for x, lay in zip(images, layouts, strict=True)]
        return torch.cat(rows) + 0 * self.newline  # a gradient even where no image has tiles

    def embed(self, pack: Pack) -> Tensor:
        """A pack's words and visual tokens as one row (1, S, D)."""
        row = self.llm.get_input_embeddings()(pack.ids)  # (S, D)
        if pack.layouts:
            seen = self.see(pack.views, pack.layouts)
            return row.index_copy(0, pack.visual, seen.to(row.dtype))[None]
        if not torch.is_grad_enabled():
            return row[None]
        # Text only: a black view at weight 0, so that every rank has a gradient for everything.
        R = self.spec.tile
        black = torch.zeros(1, 3, R, R, dtype=torch.uint8, device=row.device)
        nothing = self.projector(self.encoder(black)).sum() + self.newline.sum()
        return (row + 0 * nothing)[None]

    def read(self, row: Tensor, positions: Tensor, lengths: list[int], **keys) -> Tensor:
        """The LLM over a row (1, S, D) of documents -> hidden states (S, D).

        `keys` are for `packed_attention`: its cache, or what watches it.
        """
        mask = row.new_ones(1, 1, 1, 1)  # unused: without one transformers 5 waits for the device
        return self.llm.model(
            inputs_embeds=row,
            position_ids=positions,
            attention_mask=mask,
            documents=lengths,
            use_cache=False,
            **keys,
        ).last_hidden_state[0]

    def forward(self, pack: Pack) -> Tensor:
        """A pack -> the loss of each learned token, float32[K], its K targets in order."""
        lengths = list(pack.lengths) if self.recipe.isolate_documents else [len(pack.ids)]
        with self.autocast():
            row = self.embed(pack)  # (1, S, D)
            hidden = self.read(row, pack.positions, lengths)  # (S, D)
            if not pack.learned:  # a zero that still has a gradient for every parameter
                return self.llm.lm_head(hidden[:1]).float().sum()[None] * 0
            logits = self.llm.lm_head(hidden[pack.predict])  # (K, vocabulary)
        return F.cross_entropy(logits.float(), pack.targets, reduction="none")

    def set_trainable(self, train: str) -> dict[str, int]:
        """Freeze all but what a stage trains; returns {part: parameters that train}."""
        counts = dict.fromkeys(TRAIN["full"], 0)
        for name, p in self.named_parameters():
            part = name.split(".")[0]
            p.requires_grad_(part in TRAIN[train])
            counts[part] += p.numel() * p.requires_grad
        return counts

    def blocks(self) -> list[nn.Module]:
        """The repeated blocks of both towers: what is sharded and recomputed as a unit."""
        return [*self.encoder.blocks, *self.llm.model.layers]

    def checkpoint_activations(self, on: bool) -> None:
        """Keep each block's input only, and compute the block again in the backward pass."""
        self.encoder.recompute(on)
        if on:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        else:
            self.llm.gradient_checkpointing_disable()

    def groups(self, lr: float, vision_lr: float, projector_lr: float, decay: float) -> list[dict]:
        """Optimizer groups: encoder, projector with newline, LLM; no decay on vectors."""
        rates = {"encoder": vision_lr, "projector": projector_lr, "newline": projector_lr}
        groups: dict[tuple, list] = {}
        for name, p in self.named_parameters():
            if p.requires_grad:
                rate = rates.get(name.split(".")[0], lr)
                groups.setdefault((rate, decay if p.ndim > 1 else 0.0), []).append(p)
        return [{"params": ps, "lr": r, "weight_decay": d} for (r, d), ps in groups.items()]
