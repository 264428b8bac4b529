"""Gemma 4's assistant: a target's layers without keys and values of their own, and its own head.

It reads the target's tables and writes none. All drafts of a burst are made at one position, that
of the token the burst starts from: neither the tables nor the angles move until the target has
checked them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edge_kv.models.gemma_assistant import Config
from edge_kv.models.model import EMBED
from edge_kv.nets.gemma import Layer, angles
from edge_kv.nets.state import State
from edge_kv.nets.weights import Weights


class ClusterHead(nn.Module):
    """Logits of the tokens in the clusters whose centroids score best."""

    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.clusters, self.top = c.centroids, c.top_centroids
        self.centroids, self.order = w.linear("draft.centroids"), w.value("draft.order")
        self.rows = w.embedding("draft.head")

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        top = self.centroids(y)[0].topk(self.top).indices
        tokens = self.order().view(self.clusters, -1).index_select(0, top).flatten()
        return F.linear(y, self.rows(tokens))[0], tokens


class Net(nn.Module):
    """Over the weights of a target and of its assistant, of which the target's embedding is one."""

    def __init__(self, c: Config, w: Weights):
        super().__init__()
        self.root = c.backbone**0.5
        self.embed, self.pre = w.embedding(EMBED), w.linear("draft.pre")
        self.angles = angles(c)
        self.layers = nn.ModuleList(Layer(c, w, i, f"draft.layers.{i}") for i in range(c.layers))
        self.norm, self.post = w.norm("draft.norm", c.norm_eps), w.linear("draft.post")
        self.clusters = ClusterHead(c, w) if c.centroids else None
        self.head = None if c.centroids else w.head("draft.head")

    def forward(self, ids: Tensor, hidden: Tensor, pos: Tensor, state: State) -> Tensor:
        x = self.pre(torch.cat((self.embed(ids) * self.root, hidden), -1))
        ropes = {kind: turn(pos) for kind, turn in self.angles.items()}
        for layer in self.layers:
            # The row of the token itself is not written yet: it sees the rows before it.
            x = layer(x, None, ropes, pos - 1, state)
        return self.norm(x)

    def carry(self, y: Tensor) -> Tensor:
        return self.post(y)

    def logits(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.clusters is not None:
            scored: tuple[Tensor, Tensor] = self.clusters(y)
            return scored
        assert self.head is not None
        return self.head(y)[0], None
