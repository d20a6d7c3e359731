"""A graph's weights one at a time, between the file beside one model.onnx and the file beside another.

onnx.load and onnx.save hold all of them at once, and protobuf gives nothing back that was replaced: a conversion that
goes through them takes the weights several times over.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import TensorProto

DATA = "model.onnx.data"
LEAST_BYTES = 1024  # of a tensor in DATA; what is smaller lies in model.onnx itself


def begin(folder: Path) -> None:
    """Makes `folder` ready for `put`, which adds to what is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DATA).unlink(missing_ok=True)


def values_of(tensor: TensorProto, folder: Path) -> NDArray[Any]:
    """The values of a tensor of the graph in `folder`; mapped, so that they are read as they are used."""
    from onnx import helper, numpy_helper

    if not tensor.external_data:
        values: NDArray[Any] = numpy_helper.to_array(tensor)
        return values
    where = {entry.key: entry.value for entry in tensor.external_data}
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(folder / where["location"], dtype, "r", int(where.get("offset", 0)), tuple(tensor.dims))


def put(tensor: TensorProto, values: NDArray[Any], folder: Path) -> None:
    """Makes `values` those of a tensor of the graph in `folder`, at the end of its DATA or in the tensor itself."""
    from onnx import helper

    if tensor.data_location == tensor.EXTERNAL:
        tensor.data_location = tensor.DEFAULT
        del tensor.external_data[:]
    tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
    tensor.dims[:] = values.shape
    if values.nbytes < LEAST_BYTES:
        tensor.raw_data = values.tobytes()
        return
    tensor.ClearField("raw_data")
    tensor.data_location = tensor.EXTERNAL
    with (folder / DATA).open("ab") as file:
        for key, value in {"location": DATA, "offset": file.tell(), "length": values.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
        file.write(np.ascontiguousarray(values).data)
