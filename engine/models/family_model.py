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
from shoal.engine.models.weights.loader import Progress, QuantizedSource, WeightLoader, WeightSource
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
    source, quantized = _open_source(Path(config.model.path))
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
        quantized=quantized if config.quantization == "gguf" else None,
        total_bytes=sum(source.tensors[name].num_bytes for name in needed),
        progress=progress,
    )
    decoder = DecoderLoader(
        config.model,
        spec,
        loader,
        num_positions=config.max_model_len,
        device=device,
        ops=ops,
        topology=topology,
        collectives=collectives,
    ).load()
    loader.log_quantized()
    return decoder


def _open_source(path: Path) -> tuple[WeightSource, QuantizedSource | None]:
    """A checkpoint's weights, and the same again if its format has quantized ones."""
    if path.is_dir():
        from shoal.engine.models.weights.safetensors import SafetensorsSource

        return SafetensorsSource(path), None
    from shoal.engine.models.weights.gguf import GgufSource

    source = GgufSource(read_gguf_file(path))
    return source, source
