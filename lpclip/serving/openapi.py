"""What the server takes and answers, as OpenAPI: GET /openapi.json."""

from __future__ import annotations

from typing import Any

from lpclip import __version__
from lpclip.serving.body import MOST_TOP_K

REFUSALS = {
    400: "The body is empty or no such JSON, or the query is not known.",
    408: "The body came too slowly.",
    413: "The body is too large.",
    415: "The body is of a type that is not taken.",
    422: "The image cannot be used; the error says why.",
    500: "A fault of the server; its log says more.",
    503: "Too much waits, or the replica ended: ask again after Retry-After seconds.",
}
TOP_K = {"type": "integer", "minimum": 1, "maximum": MOST_TOP_K}


def description() -> dict[str, Any]:
    """The interface in OpenAPI 3.1."""
    error = _schema("Error")
    refusals: dict[str, Any] = {
        str(status): {"description": told, "content": {"application/json": {"schema": error}}}
        for status, told in REFUSALS.items()
    }
    refusals["503"]["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "Seconds."}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "lpclip", "version": __version__},
        "paths": {
            "/classify": {"post": _classify(refusals)},
            "/": {"get": _plain("The encoder, the classes, the probe's digest and the limits.", refusals)},
            "/health": {"get": _plain("A replica answers.", refusals)},
        },
        "components": {
            "schemas": {
                "Answer": _object(
                    label={"type": "string"},
                    probability={"type": "number"},
                    labels={"type": "array", "items": {"type": "string"}},
                    probabilities={"type": "array", "items": {"type": "number"}},
                ),
                "Error": _object(error={"type": "string"}),
                "Images": {
                    "type": "object",
                    "required": ["images"],
                    "properties": {
                        "images": {
                            "type": "array",
                            "items": {"type": "string", "contentEncoding": "base64"},
                        },
                        "top_k": TOP_K,
                    },
                    "additionalProperties": False,
                },
            }
        },
    }


def _classify(refusals: dict[str, Any]) -> dict[str, Any]:
    answer, error = _schema("Answer"), _schema("Error")
    binary = {"schema": {"type": "string", "format": "binary"}}
    return {
        "summary": "Labels of an image, or of several.",
        "parameters": [
            {
                "name": "top_k",
                "in": "query",
                "description": "For the bytes of an image alone: JSON has its own top_k, and is refused with a query.",
                "schema": TOP_K,
                "required": False,
            }
        ],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": binary,
                "application/octet-stream": binary,
                "application/json": {"schema": _schema("Images")},
            },
        },
        "responses": {
            "200": {
                "description": "An answer for an image; for JSON a list, with an answer or an error for each image.",
                "content": {
                    "application/json": {
                        "schema": {"oneOf": [answer, {"type": "array", "items": {"oneOf": [answer, error]}}]}
                    }
                },
            },
            **refusals,
        },
    }


def _schema(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "required": list(properties), "properties": properties}


def _plain(told: str, refusals: dict[str, Any]) -> dict[str, Any]:
    return {
        "summary": told,
        "responses": {
            "200": {"description": told, "content": {"application/json": {"schema": {"type": "object"}}}},
            "503": refusals["503"],
        },
    }
