"""The part of Triton's ``model_config.proto`` that rmfx writes, to read ``config.pbtxt`` with protobuf's own parser.

Names, types, enums and labels are those of Triton; what is missing here is an error when it is parsed.
"""

from __future__ import annotations

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

_LABELS = {"one": 1, "many": 3}
_SCALARS = {"int64": 3, "int32": 5, "uint64": 4, "uint32": 13, "string": 9}
_ENUMS = {
    "DataType": "TYPE_INVALID TYPE_BOOL TYPE_UINT8 TYPE_UINT16 TYPE_UINT32 TYPE_UINT64 TYPE_INT8 TYPE_INT16 TYPE_INT32 "
    "TYPE_INT64 TYPE_FP16 TYPE_FP32 TYPE_FP64 TYPE_STRING TYPE_BF16",
    "Kind": "KIND_AUTO KIND_GPU KIND_CPU KIND_MODEL",
}
_MESSAGES: dict[str, dict[str, str]] = {
    "Reshape": {"shape": "many int64"},
    "Tensor": {"name": "one string", "data_type": "one DataType", "dims": "many int64", "reshape": "one Reshape"},
    "Group": {"count": "one int32", "kind": "one Kind"},
    "Latest": {"num_versions": "one uint32"},
    "Policy": {"latest": "one Latest"},
    "Batching": {"preferred_batch_size": "many int32", "max_queue_delay_microseconds": "one uint64"},
    "Parameter": {"key": "one string", "value": "one string"},  # a map, which is written like this
    "Accelerator": {"name": "one string", "parameters": "many Parameter"},
    "Accelerators": {"gpu_execution_accelerator": "many Accelerator"},
    "Optimization": {"execution_accelerators": "one Accelerators"},
    "ModelConfig": {
        "name": "one string",
        "backend": "one string",
        "max_batch_size": "one int32",
        "input": "many Tensor",
        "output": "many Tensor",
        "instance_group": "many Group",
        "version_policy": "one Policy",
        "dynamic_batching": "one Batching",
        "optimization": "one Optimization",
    },
}


def _model_config() -> type[Any]:
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="triton", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values.split()):
            enum.value.add(name=value, number=number)
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for number, (field, spelled) in enumerate(fields.items(), 1):
            label, kind = spelled.split()
            made = message.field.add(name=field, number=number, label=_LABELS[label])  # type: ignore[arg-type]
            if kind in _SCALARS:
                made.type = _SCALARS[kind]  # type: ignore[assignment]
            else:
                made.type = 14 if kind in _ENUMS else 11  # type: ignore[assignment]
                made.type_name = f".triton.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("triton.ModelConfig"))


_CONFIG = _model_config()


def parse(text: str) -> Any:
    """A ``ModelConfig`` message; raises ``text_format.ParseError`` for a slip in ``text``."""
    return text_format.Parse(text, _CONFIG())


def name_of(message: Any, field: str) -> str:
    """The name of an enum's value."""
    return message.DESCRIPTOR.fields_by_name[field].enum_type.values_by_number[getattr(message, field)].name
