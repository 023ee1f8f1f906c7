"""Loads a model whose family has a file here."""

from __future__ import annotations

from pathlib import Path

import torch

from shoal.engine.config import EngineConfig
from shoal.engine.models.decoder import Decoder
from shoal.engine.models.decoder_loader import DecoderLoader
from shoal.engine.models.spec import DecoderSpec
from shoal.engine.models.weight_shapes import check_stored, expected_shapes
from shoal.engine.models.weights.gguf_file import read_gguf_file
from shoal.engine.models.weights.loader import Progress, WeightLoader, WeightSource
from shoal.engine.parallel.collectives import Collectives
from shoal.engine.parallel.topology import Topology
from shoal.kernels.dispatch import Operations


def load_family_model(
    config: EngineConfig,
    spec: DecoderSpec,
    ops: Operations,
    topology: Topology,
    collectives: Collectives,
    progress: Progress | None,
) -> Decoder:
    """Check that the checkpoint holds what the decoder needs, then load this rank's part of it."""
    source = _open_source(Path(config.model.path))
    check_stored(
        config.model.path,
        source.tensors,
        expected_shapes(config.model, spec),
        ignored=[spec.names.head],  # stored beside the table that it is tied to in some checkpoints
    )
    needed = expected_shapes(config.model, spec, topology)
    device = torch.device(config.device)
    loader = WeightLoader(
        source,
        dtype=getattr(torch, config.dtype),
        device=device,
        total_bytes=sum(source.tensors[name].num_bytes for name in needed),
        progress=progress,
    )
    return DecoderLoader(
        config.model,
        spec,
        loader,
        num_positions=config.max_model_len,
        device=device,
        ops=ops,
        topology=topology,
        collectives=collectives,
    ).load()


def _open_source(path: Path) -> WeightSource:
    if path.is_dir():
        from shoal.engine.models.weights.safetensors import SafetensorsSource

        return SafetensorsSource(path)
    from shoal.engine.models.weights.gguf import GgufSource

    return GgufSource(read_gguf_file(path))
