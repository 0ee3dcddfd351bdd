"""A checkpoint's weights as transformers' parameters, whole, for what is compared with a bundle."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moec.compiler.checkpoint.gguf.conversions import gguf_conversions
from moec.compiler.packing.dense_reader import DenseReader
from moec.compiler.packing.tensors.binding import bind
from moec.compiler.packing.tensors.check import check_names
from moec.compiler.packing.tensors.reading import FileSource, TensorReader
from moec.compiler.packing.tensors.stored import stored_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from moec.compiler.checkpoint import Checkpoint


def fill_parameters(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Give ``model`` the weights of a checkpoint, dequantized, each in the type that it has there.

    Raises:
        CheckpointError: tensors are missing, unexpected or misshapen, or a file is damaged.
        UnsupportedModelError: the checkpoint is quantized in a way that moec does not read.
    """
    state = model.state_dict()
    bindings = bind(
        model, stored_tensors(checkpoint.index, checkpoint.config), gguf_conversions(checkpoint.config)
    )
    parameters, _ = check_names(model, bindings, state)
    dtypes: dict[str, torch.dtype] = {name: state[name].dtype for name in parameters}
    reader = DenseReader(parameters, dtypes, {}, {}, TensorReader(FileSource()), model, lambda _: None)
    with torch.no_grad():
        for name in parameters:
            state[name].copy_(reader.parameter(name))
