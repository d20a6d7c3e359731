"""The small server over gRPC: KServe v2 with streams."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from typing import Any

import grpc
from small_model import MODELS, Broken, CutShort, ModelError, Server
from tritonclient.grpc import service_pb2, service_pb2_grpc


def read_inputs(request: Any) -> dict[str, Any]:
    inputs: dict[str, Any] = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            inputs[tensor.name] = raw[4 : 4 + struct.unpack_from("<I", raw)[0]].decode()
        elif tensor.datatype == "BOOL":
            inputs[tensor.name] = bool(raw[0])
        else:
            inputs[tensor.name] = list(struct.unpack(f"<{len(raw) // 4}i", raw))
    return inputs


_FORMATS = {
    "text_output": "BYTES",
    "finish_reason": "BYTES",
    "cumulative_logprob": "FP32",
    "num_input_tokens": "UINT32",
    "num_output_tokens": "UINT32",
}


def write_outputs(model: str, outputs: dict[str, Any]) -> Any:
    response = service_pb2.ModelStreamInferResponse()
    response.infer_response.model_name = model
    for name, value in outputs.items():
        kind = _FORMATS[name]
        response.infer_response.outputs.add(name=name, datatype=kind, shape=[1])
        if kind == "BYTES":
            data = value.encode()
            response.infer_response.raw_output_contents.append(struct.pack("<I", len(data)) + data)
        else:
            response.infer_response.raw_output_contents.append(struct.pack("<f" if kind == "FP32" else "<I", value))
    return response


class Grpc(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, server: Server) -> None:
        self.server = server

    async def ServerReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        return service_pb2.ModelReadyResponse(ready=request.name in MODELS)

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        response = service_pb2.ModelMetadataResponse(name=request.name)
        for name in self.server.input_names():
            response.inputs.add(name=name, datatype="BYTES", shape=[1])
        return response

    async def RepositoryIndex(self, request: Any, context: Any) -> Any:  # noqa: N802, ARG002
        response = service_pb2.RepositoryIndexResponse()
        for name, versions in MODELS.items():
            for version in versions:
                response.models.add(name=name, version=version, state="READY")
        return response

    async def ModelStreamInfer(self, requests: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        if any(key == "triton_grpc_error" for key, _ in context.invocation_metadata()):
            await context.abort(grpc.StatusCode.INTERNAL, "a real Triton 2.51 dies of this metadata")
        async for request in requests:
            try:
                self.server.check(request.model_name, request.model_version)
                async for outputs in self.server.answer(request.model_name, read_inputs(request)):
                    yield write_outputs(request.model_name, outputs)
            except ModelError as error:
                yield service_pb2.ModelStreamInferResponse(error_message=str(error))
                if self.server.log:
                    await asyncio.sleep(self.server.plan(read_inputs(request)).end_s)
                    self.server.log[-1]["status"] = "sent"
                continue
            except CutShort:
                return
            except Broken:
                # What a client sees when the server's process dies.
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            final = service_pb2.ModelStreamInferResponse()
            final.infer_response.model_name = request.model_name
            final.infer_response.parameters["triton_final_response"].bool_param = self.server.log[-1]["ended"] != (
                "cut short"
            )
            yield final
