"""The published schema, made from the dataclasses of `document`: python -m cacompile.explanation.schema writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from cacompile.passes.plan import SharedAxis, Slice

from .document import Document, DocumentedProduct, MadeBy, VersionSizes
from .facts import ExplainedGroup, ExplainedParam, StepFlops, Uncounted

FILE = Path(__file__).with_name("explain.schema.json")


_PARTS = (
    Document, DocumentedProduct, ExplainedGroup, ExplainedParam, MadeBy, SharedAxis, Slice, StepFlops, Uncounted,
    VersionSizes,
)  # fmt: skip
_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class _Untitled(GenerateJsonSchema):
    """Without the titles that pydantic makes of fields' names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def made() -> dict[str, Any]:
    """JSON Schema 2020-12 of a `Document`."""
    for part in _PARTS:
        setattr(part, "__pydantic_config__", _CONFIG)  # noqa: B010  (mypy knows no such attribute)
    found = TypeAdapter(Document).json_schema(mode="serialization", schema_generator=_Untitled)
    return {"$schema": GenerateJsonSchema.schema_dialect, **found}


if __name__ == "__main__":
    FILE.write_text(json.dumps(made(), indent=2) + "\n", encoding="utf-8")
