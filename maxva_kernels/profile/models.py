"""Lists of parameter shapes: real models, a user's own; made smaller where memory is short."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from maxva_kernels.profile import InputError, unknown

#: (shape, decays) pairs in their order of registration.
Shapes = list[tuple[tuple[int, ...], bool]]


@dataclass(frozen=True)
class Model:
    """A list of parameters with a name.

    Attributes:
        name: what rows of the report are called by.
        shapes: of the parameters.
        layers: how many equal layers it has, or 0 where it does not consist of such.
        with_layers: makes the same model with another number of layers.
    """

    name: str
    shapes: Shapes
    layers: int = 0
    with_layers: Callable[[int], Shapes] | None = None

    @property
    def numel(self) -> int:
        return num_parameters(self.shapes)

    def shrunk_to(self, numel: int) -> Model | None:
        """The model with as many layers as fit in `numel` parameters; None if not even one does."""
        if self.numel <= numel:
            return self
        if self.with_layers is None:
            return None
        for layers in range(self.layers - 1, 0, -1):
            shapes = self.with_layers(layers)
            if num_parameters(shapes) <= numel:
                name = f"{self.name}[{layers} of {self.layers} layers]"
                return replace(self, name=name, shapes=shapes, layers=layers)
        return None


def num_parameters(shapes: Shapes) -> int:
    """Elements of all parameters together."""
    return sum(math.prod(shape) for shape, _ in shapes)


def _linear(outputs: int, inputs: int) -> Shapes:
    return [((outputs, inputs), True), ((outputs,), False)]


def bert(layers: int, hidden: int, vocabulary: int = 30522, positions: int = 512) -> Shapes:
    """BertForPreTraining with tied embeddings; biases and LayerNorm do not decay."""
    norm: Shapes = [((hidden,), False), ((hidden,), False)]
    shapes: Shapes = [*(((rows, hidden), True) for rows in (vocabulary, positions, 2)), *norm]
    for _ in range(layers):
        for _ in range(4):  # query, key, value, output
            shapes += _linear(hidden, hidden)
        shapes += norm + _linear(4 * hidden, hidden) + _linear(hidden, 4 * hidden) + norm
    shapes += _linear(hidden, hidden)  # pooler
    shapes += [((vocabulary,), False), *_linear(hidden, hidden), *norm, *_linear(2, hidden)]
    return shapes


def gpt2(layers: int, hidden: int, vocabulary: int = 50257, positions: int = 1024) -> Shapes:
    """GPT2LMHeadModel with tied embeddings; its Conv1D weights are (inputs, outputs)."""
    norm: Shapes = [((hidden,), False), ((hidden,), False)]
    shapes: Shapes = [((vocabulary, hidden), True), ((positions, hidden), True)]
    for _ in range(layers):
        shapes += norm
        shapes += [((hidden, 3 * hidden), True), ((3 * hidden,), False)]
        shapes += _linear(hidden, hidden) + norm
        shapes += [((hidden, 4 * hidden), True), ((4 * hidden,), False)]
        shapes += [((4 * hidden, hidden), True), ((hidden,), False)]
    return shapes + norm


def llama(layers: int, hidden: int, heads_kv: int, feed_forward: int, vocabulary: int) -> Shapes:
    """LlamaForCausalLM with tied embeddings; `heads_kv` is the width of keys and values."""
    shapes: Shapes = [((vocabulary, hidden), True)]
    for _ in range(layers):
        for outputs in (hidden, heads_kv, heads_kv, hidden):  # query, key, value, output
            shapes.append(((outputs, hidden), True))
        shapes += [((feed_forward, hidden), True)] * 2 + [((hidden, feed_forward), True)]
        shapes += [((hidden,), False)] * 2
    return [*shapes, ((hidden,), False)]


def resnet50(classes: int = 1000) -> Shapes:
    """ResNet-50 of torchvision; batch norms and the bias do not decay."""

    def convolution(outputs: int, inputs: int, size: int) -> Shapes:
        return [((outputs, inputs, size, size), True), ((outputs,), False), ((outputs,), False)]

    shapes, inputs = convolution(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(width, inputs, 1) + convolution(width, width, 3)
            shapes += convolution(4 * width, width, 1)
            if block == 0:
                shapes += convolution(4 * width, inputs, 1)
            inputs = 4 * width
    return shapes + _linear(classes, inputs)


def _layered(name: str, layers: int, with_layers: Callable[[int], Shapes]) -> Model:
    return Model(name, with_layers(layers), layers, with_layers)


MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _layered("bert-base", 12, lambda layers: bert(layers, hidden=768)),
        _layered("bert-large", 24, lambda layers: bert(layers, hidden=1024)),
        _layered("gpt2-xl", 48, lambda layers: gpt2(layers, hidden=1600)),
        _layered("llama-1b", 16, lambda layers: llama(layers, 2048, 512, 8192, 128256)),
        Model("resnet-50", resnet50()),
        Model("tiny-10000x64", [((64,), False)] * 10_000),
        Model("tiny-400x64", [((64,), False)] * 400),
        # half of them compact, where states are: the host's part of a step with both forms
        Model("tiny-200x4096-200x64", [((32, 128), True), ((64,), False)] * 200),
    )
}


def find_model(name: str) -> Model:
    """A model of the list, or `module:factory`.

    Raises:
        InputError: there is no such model, or its factory does not give parameters.
    """
    if ":" in name:
        return _made_by(name)
    if name not in MODELS:
        raise unknown("model", name, [*MODELS, "module:factory"])
    return MODELS[name]


def _made_by(name: str) -> Model:
    """The trainable parameters of what `module:factory` returns when called without arguments."""
    module_name, _, factory = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script has its own folder there instead
    try:
        made = getattr(importlib.import_module(module_name), factory)()
        found: Iterable[Any] = made.parameters() if isinstance(made, torch.nn.Module) else made
        params = [p for p in found if p.requires_grad]
    except Exception as error:  # a user's code may raise anything
        raise InputError(f"--model {name} raises {type(error).__name__}: {error}") from error
    if not params:
        raise InputError(f"--model {name} returns no parameters that require gradients")
    return Model(factory, [(tuple(p.shape), p.dim() > 1) for p in params])


def load_shapes(path: Path) -> Model:
    """A model from a JSON file.

    The file holds a list. An entry is a shape, `[768, 3072]`, or an object with `shape` and, if
    wanted, `count` (1) and `decays` (whether it has two dimensions or more).

    Raises:
        InputError: the file cannot be read or is not of this form.
    """
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"--shapes {path}: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"--shapes {path}: must be a list of shapes that is not empty")
    shapes: Shapes = []
    for index, entry in enumerate(entries):
        whole = entry if isinstance(entry, dict) else {"shape": entry}
        shape, count = whole.get("shape"), whole.get("count", 1)
        decays = whole.get("decays")
        if (
            not set(whole) <= {"shape", "count", "decays"}
            or not isinstance(shape, list)
            or not all(_is_size(size) for size in shape)
            or not _is_size(count)
            or not (decays is None or isinstance(decays, bool))
        ):
            raise InputError(
                f"--shapes {path}: entry {index} must be a list of positive sizes or "
                f'{{"shape": [...], "count": 1, "decays": true}}, is {json.dumps(entry)}'
            )
        shapes += [(tuple(shape), len(shape) > 1 if decays is None else decays)] * count
    return Model(path.stem, shapes)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
