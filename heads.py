"""The attentive head: a query attends to each time step of a video, and a small transformer reads the results in order.

    query      a learned vector, or made from the clip's text                    (B, D)
    steps      attention of the query to the tokens of each time step            (B, t, D)
    logits     transformer block over [CLS,] query and steps, mean, linear       (B, K)

In a captioner, each of several learned queries becomes a token for the language model in the same way.

The linear head reads one pooled token, which mixes objects and, with image encoders, has lost the order of the
frames. A single attention over all tokens loses the order too: it averages what comes before a turn with what comes
after. One result per time step keeps both, and a query made from the text follows the object that the text names.
Attentive probes without time steps or text are in CoCa (arXiv:2205.01917) and V-JEPA (arXiv:2404.08471).

Shapes: B batch, N video tokens, L text tokens, D width, K classes, t time steps, n tokens per time step,
h heads, q queries.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NUM_QUERIES = 16  # of a captioner
WORD_LOSS = 0.3  # weight of the word loss beside the loss of the captions


def classifier_layer(width: int, num_classes: int) -> nn.Linear:
    """A new layer (*, D) -> (*, K). Its weights are small, so that no class is preferred at the start."""
    layer = nn.Linear(width, num_classes)
    nn.init.normal_(layer.weight, std=0.02)
    nn.init.zeros_(layer.bias)
    return layer


class StepAttention(nn.Module):
    """Multi-head attention of a few queries to the tokens of each time step.

    With few queries there is no need to project every token to a key and a value: q . (K x) = (K^T q) . x, and a
    weighted mean of V x is V times the weighted mean of x. So K is applied to the queries and V to the means.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax would cancel a bias

    def forward(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Queries (B or 1, q, D) and tokens (B, t, n, D) -> (B, t, q, D)."""
        # K^T q of each head: what it looks for, as a vector in the space of the tokens
        key = self.key.weight.unflatten(0, (self.heads, -1))  # (h, D / h, D)
        queries = self.query(queries).unflatten(-1, (self.heads, -1)) * self.scale  # (B, q, h, D / h)
        wanted = torch.einsum("bqhd,hde->bqhe", queries, key).flatten(1, 2)  # (B, q h, D)

        # V times the weighted mean token of each query, head and time step
        weights = (wanted[:, None] @ tokens.transpose(2, 3)).softmax(-1)  # (B, t, q h, n)
        means = (weights @ tokens).unflatten(2, (-1, self.heads))  # (B, t, q, h, D)
        value = self.value.weight.unflatten(0, (self.heads, -1))  # (h, D / h, D)
        return self.out(torch.einsum("btqhe,hde->btqhd", means, value).flatten(3) + self.value.bias)


class StepReader(nn.Module):
    """Queries and the grid tokens of a video -> for each query, what it finds over time."""

    def __init__(self, vision: Any, dropout: float):
        """`vision` is the VisionEncoder whose tokens are read."""
        super().__init__()
        width, heads = vision.config.hidden_size, vision.config.num_attention_heads
        self.times, self.num_pooled = vision.num_times, int(vision.has_pooled_token)
        self.norm = nn.LayerNorm(width)  # backbones differ in the scale of their tokens

        # attention to each time step; tokens need no position embedding, they carry their position from the backbone
        self.query_norm = nn.LayerNorm(width)
        self.attention = StepAttention(width, heads)
        self.time_embedding = nn.Parameter(0.1 * torch.randn(self.times, width))

        # a second block was no better
        block = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout, F.gelu, batch_first=True, norm_first=True)
        self.reader = nn.Sequential(block, nn.LayerNorm(width))

    def read(self, queries: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Queries (B or 1, q, D) and tokens from VisionEncoder.encode_video (B, N, D) -> (B, q, D)."""
        # the pooled token belongs to no time step
        tokens = self.norm(tokens)
        pooled, grid = tokens[:, : self.num_pooled], tokens[:, self.num_pooled :].unflatten(1, (self.times, -1))

        # the same queries for all time steps; the time embedding tells the steps apart
        steps = self.attention(queries, grid) + self.time_embedding[:, None]  # (B, t, q, D)

        # one sequence per query, which includes the query itself: a text alone may tell something about the class
        batch, count = steps.shape[0], steps.shape[2]
        queries = self.query_norm(queries)[:, :, None].expand(batch, -1, -1, -1)  # (B, q, 1, D)
        pooled = pooled[:, None].expand(-1, count, -1, -1)  # (B, q, 0 or 1, D)
        sequences = torch.cat([pooled, queries, steps.transpose(1, 2)], dim=2)  # (B, q, [1 +] 1 + t, D)
        return self.reader(sequences.flatten(0, 1)).mean(1).unflatten(0, (batch, count))


class AttentiveHead(StepReader):
    """The grid tokens of a video -> logits. The query is a learned vector, or what `text_query` makes from a text."""

    def __init__(self, vision: Any, num_classes: int, dropout: float, text_query: "TextQuery | None" = None):
        super().__init__(vision, dropout)
        width = vision.config.hidden_size
        self.text_query = text_query
        if text_query is None:
            self.query = nn.Parameter(torch.randn(width))
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier_layer(width, num_classes)

    def forward(self, tokens: torch.Tensor, *text: torch.Tensor) -> torch.Tensor:
        """Tokens from VisionEncoder.encode_video (B, N, D) and, if there is text, TextQuery's arguments -> (B, K)."""
        query = self.query[None] if self.text_query is None else self.text_query(*text)  # (B or 1, D)
        return self.classifier(self.dropout(self.read(query[:, None], tokens)[:, 0]))


class AttentiveProjector(StepReader):
    """The grid tokens of a video -> a few tokens for a language model, one for each learned query.

    Each query follows one thing through the video, such as the red object, so a token tells what that thing is and
    does. Perceiver-like resamplers (arXiv:2204.14198) have queries too, but not one result per time step.
    """

    def __init__(self, vision: Any, width: int, dropout: float):
        """`width` is that of the language model's embeddings."""
        super().__init__(vision, dropout)
        hidden, self.num_tokens = vision.config.hidden_size, NUM_QUERIES
        self.queries = nn.Parameter(torch.randn(NUM_QUERIES, hidden))
        self.project = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, width))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens from VisionEncoder.encode_video (B, N, D) -> (B, num_tokens, width)."""
        return self.project(self.read(self.queries[None], tokens))


class WordLoss:
    """Penalises a captioner whose mean video token does not predict the words in the captions of its clip.

    In the language model's loss, the words that say what happens count little: most words follow from grammar, or are
    one of several synonyms. On a self-supervised encoder, the projector then learns colours and no motions. This
    loss is about the set of words in all captions of the clip, weighted by their rarity, as in SuperClass
    (arXiv:2411.03313). Scores are scaled dot products with whitened word embeddings (why whitened: see TextQuery), so
    it has no parameters.

    Shapes: N tokens for the language model, W their width, V vocabulary, k words (the language model's tokens) that
    occur in captions.
    """

    def __init__(self, model: Any, captions: list[tuple[str, ...]]):
        """`captions` are all captions of each training clip. A hook keeps the tokens of the last forward pass."""
        self.codec, self.captions = model.codec(), captions
        clips_with = Counter(word for texts in captions for word in self.token_ids(texts))
        self.column = {word: column for column, word in enumerate(sorted(clips_with))}
        counts = torch.tensor([clips_with[word] for word in self.column])
        embeddings = model.language_model.get_input_embeddings().weight.detach().float()  # (V, W)
        self.idf = torch.log((1 + len(captions)) / (1 + counts))  # (k,)
        with torch.no_grad():
            self.table = whitening(embeddings)(embeddings[[*self.column]]) / embeddings.shape[1] ** 0.5  # (k, W)
        model.projector.register_forward_hook(self.keep)

    def token_ids(self, texts: tuple[str, ...]) -> set[int]:
        return {token for ids in self.codec.tokens([*texts]) for token in ids}

    def keep(self, projector: nn.Module, inputs: tuple, tokens: torch.Tensor) -> None:
        self.tokens = tokens  # (B, N, W)

    def __call__(self, indices: list[int]) -> torch.Tensor:
        """The loss of each clip of the last batch; `indices` are its clips. (B,)"""
        target = torch.zeros(len(indices), len(self.column))
        for row, index in enumerate(indices):
            columns = [self.column[word] for word in self.token_ids(self.captions[index])]
            target[row, columns] = self.idf[columns]
        target = F.normalize(target, p=1, dim=1).to(self.table.device)  # (B, k)

        tokens = self.tokens.float()
        mean = F.layer_norm(tokens, tokens.shape[-1:]).mean(1)  # (B, W)
        return F.cross_entropy(mean @ self.table.T, target, reduction="none")


class TextQuery(nn.Module):
    """A text -> a query (B, D): the mean of its word embeddings, weighted as the language model's outputs say.

    The outputs themselves make a bad query. They are nearly parallel whatever the text says (arXiv:1909.00512): those
    of "red" and "blue" have cosine 0.997 in BERT-tiny. Training then finds a query that suits all texts, and stays
    there. The word embeddings are alike too, with cosine 0.92, but they can be whitened before training
    (arXiv:2103.15316), so that different words make different queries from the first step on.
    """

    def __init__(self, embeddings: torch.Tensor, hidden: int, width: int):
        super().__init__()
        self.whiten = whitening(embeddings)
        # without biases, which the softmax would cancel
        self.gate = nn.Sequential(nn.LayerNorm(hidden, bias=False), nn.Linear(hidden, 1, bias=False))
        self.project = nn.Sequential(nn.LayerNorm(embeddings.shape[1]), nn.Linear(embeddings.shape[1], width))

    def forward(self, embeddings: torch.Tensor, outputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Word embeddings and language model's outputs (B, L, *), mask (B, L) without empty rows -> (B, D)."""
        gate = self.gate(outputs).masked_fill(mask[..., None] == 0, -torch.inf).softmax(1)  # (B, L, 1)
        return self.project((gate * self.whiten(embeddings)).sum(1))


def whitening(vectors: torch.Tensor) -> nn.Linear:
    """A linear layer that first gives the vectors (n, D) mean 0 and identity covariance (ZCA whitening)."""
    vectors = vectors.detach().float()
    mean, width = vectors.mean(0), vectors.shape[1]
    variances, axes = torch.linalg.eigh((vectors - mean).T @ (vectors - mean) / len(vectors))

    # where the vectors hardly vary, a thousandth of the mean variance keeps noise small
    scale = (variances.clamp(min=0) + 1e-3 * variances.mean()).rsqrt()
    layer = nn.Linear(width, width, device=vectors.device)
    with torch.no_grad():
        layer.weight.copy_((axes * scale) @ axes.T)
        layer.bias.copy_(-layer.weight @ mean)
    return layer
