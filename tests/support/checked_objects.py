"""Kubernetes objects, checked against the API's own schemas, or those of the operators of custom objects."""

import json
from functools import cache
from typing import Any

import pytest
from rendered_chart import ROOT, Object, jobs

kubernetes = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate: make test-deploy")
jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema: make test-deploy")

CRDS = ROOT / "tests" / "data" / "crds"


@cache
def custom(kind: str) -> Any:  # noqa: ANN401 - jsonschema has no types
    path = CRDS / f"{kind}.json"
    return jsonschema.Draft202012Validator(json.loads(path.read_text("utf-8"))) if path.is_file() else None


def check(made: Object, version: str) -> None:
    """Fails if this Kubernetes version, or the custom object's operator, would refuse it or drop one of its fields."""
    if (validator := custom(made["kind"])) is not None:
        validator.validate(made)
    else:
        kubernetes.validate(made, version, strict=True)


def check_all(objects: list[Object], version: str) -> None:
    """Checks all objects, those inside others too, and their names."""
    for made in objects:
        check(made, version)
    for spec in jobs(objects):  # jobs inside a JobSet have no kind, so nothing above has checked them
        check({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "inner"}, "spec": spec}, version)
    keys = [(made["kind"], made["metadata"]["name"]) for made in objects]
    assert len(set(keys)) == len(keys)
    assert all(len(name) <= 63 for _, name in keys)
