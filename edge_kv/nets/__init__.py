"""What each model computes, in PyTorch: a forward pass over static state tables."""

from __future__ import annotations

from importlib import import_module

from edge_kv.models.model import Model
from edge_kv.nets.weights import Decoder, Weights


def make_net(config: Model, weights: Weights) -> Decoder:
    """The net of `config`: edge_kv/nets/x.py computes what edge_kv/models/x.py describes."""
    name = type(config).__module__.rpartition(".")[2]
    net: Decoder = import_module(f"edge_kv.nets.{name}").Net(config, weights)
    return net
