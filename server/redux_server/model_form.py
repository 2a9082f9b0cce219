"""The request's parameters as a form: a JSON schema as flat as form builders and tools expect it.

Made of ``PredictionRequest`` itself, so that a parameter that is added there is in the form.
"""

from functools import cache
from typing import Any

from pydantic import BaseModel

from redux_server.schemas import PredictionRequest

# Whom to tell is no property of the image, and a form cannot know it.
NOT_IN_THE_FORM = frozenset({"webhook", "webhook_url"})
_KEPT = ("type", "properties", "required")


@cache
def request_form() -> dict[str, Any]:
    """The form of a task; callers must not change it."""
    return form_of(PredictionRequest, leave_out=NOT_IN_THE_FORM)


def form_of(model: type[BaseModel], *, leave_out: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The JSON schema of ``model`` with ``x-order-properties``, and neither references nor nulls.

    "This type or null" becomes this type: clients read a property's ``type`` and ``enum`` and know
    no ``anyOf``, and to leave a parameter out is to give null.
    """
    schema = model.model_json_schema()
    definitions = schema.get("$defs", {})
    properties = {
        name: _flat(each, definitions)
        for name, each in schema["properties"].items()
        if name not in leave_out
    }
    form = {**schema, "properties": properties}
    form["required"] = [name for name in schema.get("required", ()) if name in properties]
    return {name: form[name] for name in _KEPT} | {"x-order-properties": list(properties)}


def _flat(schema: Any, definitions: dict[str, Any]) -> Any:
    """``schema`` without references, nulls and generated titles, at any depth."""
    if isinstance(schema, list):
        return [_flat(each, definitions) for each in schema]
    if not isinstance(schema, dict):
        return schema
    if (reference := schema.get("$ref")) is not None:
        named = definitions[reference.rpartition("/")[2]]
        schema = {**named, **{name: schema[name] for name in schema if name != "$ref"}}
    variants = [each for each in schema.get("anyOf", ()) if each != {"type": "null"}]
    if len(variants) == 1:
        schema = {**variants[0], **{name: schema[name] for name in schema if name != "anyOf"}}
        return _flat(schema, definitions)
    return {
        name: _flat(value, definitions)
        for name, value in schema.items()
        if not (name == "title" and isinstance(value, str))
        and not (name == "default" and value is None)
    }
