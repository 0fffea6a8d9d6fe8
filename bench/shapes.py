"""Parameter shapes of real models, as (shape, decays) pairs in their order of registration."""

from __future__ import annotations

Shapes = list[tuple[tuple[int, ...], bool]]


def bert(layers: int, hidden: int, vocabulary: int = 30522, positions: int = 512) -> Shapes:
    """BertForPreTraining with tied embeddings; biases and LayerNorm do not decay."""

    def linear(outputs: int, inputs: int) -> Shapes:
        return [((outputs, inputs), True), ((outputs,), False)]

    norm: Shapes = [((hidden,), False), ((hidden,), False)]
    shapes: Shapes = [*(((rows, hidden), True) for rows in (vocabulary, positions, 2)), *norm]
    for _ in range(layers):
        for _ in range(4):  # query, key, value, output
            shapes += linear(hidden, hidden)
        shapes += norm + linear(4 * hidden, hidden) + linear(hidden, 4 * hidden) + norm
    shapes += linear(hidden, hidden)  # pooler
    shapes += [((vocabulary,), False), *linear(hidden, hidden), *norm, *linear(2, hidden)]
    return shapes


MODELS: dict[str, Shapes] = {
    "bert-base": bert(layers=12, hidden=768),
    "bert-large": bert(layers=24, hidden=1024),
    "tiny-400": [((64,), False)] * 400,
}


def num_parameters(shapes: Shapes) -> int:
    total = 0
    for shape, _ in shapes:
        count = 1
        for size in shape:
            count *= size
        total += count
    return total
