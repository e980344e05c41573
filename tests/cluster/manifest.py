"""A strict reading of Kubernetes objects by lightkube's models, which are made from the API's own schema.

The models are dataclasses of a package of their own. They ask for three names of lightkube itself, a client with
dependencies that is not needed here; what they ask for is given to them.
"""

import dataclasses
import importlib
import sys
import types
import typing
from collections.abc import Iterator
from typing import Any

KINDS = {("v1", "ConfigMap"): "core_v1", ("v1", "Service"): "core_v1", ("batch/v1", "Job"): "batch_v1"}


class _Plain:
    """In the place of the mixin that reads and writes dictionaries."""


def _models(name: str) -> Any:
    schema: Any = types.ModuleType("lightkube.core.schema")
    schema.dataclass, schema.field, schema.DictMixin = dataclasses.dataclass, dataclasses.field, _Plain
    sys.modules.setdefault("lightkube.core", types.ModuleType("lightkube.core"))
    sys.modules.setdefault("lightkube.core.schema", schema)
    return importlib.import_module(f"lightkube.models.{name}")


def wrong_fields(document: dict[str, Any]) -> list[str]:
    """What the API would refuse: fields that it does not know, that are missing, or of another type."""
    module = _models(KINDS[document["apiVersion"], document["kind"]])
    return list(_wrong(document, getattr(module, document["kind"]), document["kind"]))


def _wrong(value: Any, kind: Any, where: str) -> Iterator[str]:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        choices = [one for one in inner if one is not type(None)]
        if value is None and len(choices) < len(inner):
            return
        tries = [list(_wrong(value, choice, where)) for choice in choices]
        if all(tries):
            yield from min(tries, key=len)
    elif dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            yield f"{where} is {value!r}, not {kind.__name__}"
            return
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            if required and field.name not in value:
                yield f"{where}.{field.name} is missing"
        for name, item in value.items():
            if name not in hints:
                yield f"{where}.{name} is unknown"
            else:
                yield from _wrong(item, hints[name], f"{where}.{name}")
    elif origin is list:
        if not isinstance(value, list):
            yield f"{where} is {value!r}, not a list"
            return
        for number, item in enumerate(value):
            yield from _wrong(item, inner[0], f"{where}.{number}")
    elif kind is dict or origin is dict:
        if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
            yield f"{where} is {value!r}, not a mapping of strings"
            return
        for name, item in value.items():
            if inner:
                yield from _wrong(item, inner[1], f"{where}.{name}")
    elif kind in (str, int, bool, float) and (not isinstance(value, kind) or (kind is int and isinstance(value, bool))):
        yield f"{where} is {value!r}, not {kind.__name__}"
