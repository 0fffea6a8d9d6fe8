"""BERT shapes, the pretraining loss and the weight-decay groups; knows nothing of data or CLI."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from data import IGNORED_LABEL
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForPreTraining


@dataclass(frozen=True)
class Shape:
    """Size of a BERT encoder and the vocabulary it is usually given."""

    layers: int
    hidden: int
    heads: int
    vocab_size: int
    positions: int = 512

    def config(self, vocab_size: int) -> BertConfig:
        """The Hugging Face configuration with the dropout of 0.1 that BERT uses."""
        return BertConfig(
            vocab_size=vocab_size,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden,
            max_position_embeddings=self.positions,
        )


SHAPES = {
    "tiny": Shape(layers=2, hidden=128, heads=2, vocab_size=2048),
    "small": Shape(layers=4, hidden=512, heads=8, vocab_size=8192),
    "base": Shape(layers=12, hidden=768, heads=12, vocab_size=30522),
    "large": Shape(layers=24, hidden=1024, heads=16, vocab_size=30522),
}


def pretraining_losses(
    model: BertForPreTraining, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Summed losses of a batch.

    Sums, not means, so that a batch has the same loss however it is cut into micro-batches. The
    vocabulary projection runs over the masked positions only, a seventh of the work.

    Returns:
        Summed masked-LM loss, summed next-sentence loss, number of correct next-sentence answers.
    """
    hidden = model.bert(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        token_type_ids=batch["token_type_ids"],
    )
    masked = batch["labels"] != IGNORED_LABEL
    token_logits = model.cls.predictions(hidden.last_hidden_state[masked])
    pair_logits = model.cls.seq_relationship(hidden.pooler_output)
    answers = batch["next_sentence_label"]
    mlm = cross_entropy(token_logits.float(), batch["labels"][masked], reduction="sum")
    nsp = cross_entropy(pair_logits.float(), answers, reduction="sum")
    return mlm, nsp, (pair_logits.argmax(-1) == answers).sum()


class PretrainingLosses(nn.Module):
    """`pretraining_losses` as a forward pass, which is where DDP and FSDP2 hook in."""

    def __init__(self, model: BertForPreTraining) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `pretraining_losses`."""
        return pretraining_losses(self.model, batch)


#: What the parameter groups of `decay_groups` are called in logs and plots.
GROUPS = ("weights", "biases and LayerNorm")


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Two parameter groups: weights with decay; biases and LayerNorm without."""
    undecayed = {
        id(parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if isinstance(module, nn.LayerNorm) or name.endswith("bias")
    }
    parameters = list(model.parameters())
    return [
        {
            "params": [p for p in parameters if id(p) not in undecayed],
            "weight_decay": weight_decay,
        },
        {"params": [p for p in parameters if id(p) in undecayed], "weight_decay": 0.0},
    ]
