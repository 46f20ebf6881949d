"""What a newer OpenAPI document breaks: callers of the older one must be served as before.

A request that was accepted must still be accepted, and what an answer had must still be in it, with the same type.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Json = Mapping[str, Any]
LOWER = ("minimum", "exclusiveMinimum", "minLength", "minItems")
UPPER = ("maximum", "exclusiveMaximum", "maxLength", "maxItems")
ERROR = "400"


def breaks(old: Json, new: Json) -> list[str]:
    """One sentence for each thing that callers of `old` cannot rely on any more."""
    found: list[str] = []
    for path, methods in old["paths"].items():
        for method, before in methods.items():
            name, after = f"{method.upper()} {path}", new["paths"].get(path, {}).get(method)
            found += [f"{name} is gone"] if after is None else _of_operation(name, before, after, old, new)
    return found


def _of_operation(name: str, before: Json, after: Json, old: Json, new: Json) -> Iterator[str]:
    if _is_open(before) and not _is_open(after):
        yield f"{name} needs a key"
    given, taken = _parameters(before, old), _parameters(after, new)
    asks, wants = Subset(old, new, answers=False), Subset(new, old, answers=True)
    for key, parameter in taken.items():
        if parameter.get("required") and not given.get(key, {}).get("required"):
            yield f"{name} requires {key[1]}"
    for key, parameter in given.items():
        if key not in taken:
            yield f"{name} takes no {key[1]} any more"
        else:
            yield from asks.problems(parameter["schema"], taken[key]["schema"], f"{name} {key[1]}")
    if "requestBody" in before:
        sent, read = (_content(each["requestBody"])["application/json"]["schema"] for each in (before, after))
        yield from asks.problems(sent, read, f"{name} request")
    elif after.get("requestBody", {}).get("required"):
        yield f"{name} requires a body"
    for status, answer in before["responses"].items():
        if status >= ERROR and status not in after["responses"]:
            continue  # an error that is not given any more
        for kind, content in _content(answer).items():
            now = _content(after["responses"].get(status, {})).get(kind)
            place = f"{name} {status} {kind}"
            yield from [f"{place} is gone"] if now is None else wants.problems(now["schema"], content["schema"], place)


def _is_open(operation: Json) -> bool:
    return not operation["security"] or {} in operation["security"]


def _parameters(operation: Json, document: Json) -> dict[tuple[str, str], Json]:
    resolved = (_resolved(parameter, document) for parameter in operation["parameters"])
    return {(parameter["in"], parameter["name"]): parameter for parameter in resolved}


def _content(described: Json) -> Json:
    content: Json = described.get("content", {})
    return content


def _resolved(node: Json, document: Json) -> Json:
    while "$ref" in node:
        place = node["$ref"].removeprefix("#/").split("/")
        node = document
        for part in place:
            node = node[part]
    return node


@dataclass(frozen=True, slots=True)
class Subset:
    """Whether all values of a schema of one document are values of a schema of another.

    `answers`: a property that is gone is a problem too, although an object without it is still valid.
    """

    document: Json
    other: Json
    answers: bool

    def problems(self, sub: Json, sup: Json, place: str) -> list[str]:
        sub, sup = _resolved(sub, self.document), _resolved(sup, self.other)
        if not sup.keys() - {"description", "default", "examples"}:
            return []
        parts, wholes = sub.get("anyOf"), sup.get("anyOf")
        if parts is not None:
            return [problem for part in parts for problem in self.problems(part, sup, place)]
        if wholes is not None:
            tried = [self.problems(sub, whole, place) for whole in wholes]
            return min(tried, key=len)
        return list(self._of_values(sub, sup, place))

    def _of_values(self, sub: Json, sup: Json, place: str) -> Iterator[str]:
        kinds = {sub.get("type"), "number"} if sub.get("type") == "integer" else {sub.get("type")}
        if sup.get("type") not in {None, *kinds}:
            yield f"{place} is {sub.get('type')}, not {sup['type']}"
            return
        allowed, given = _values(sup), _values(sub)
        if allowed is not None and (given is None or not given <= allowed):
            yield f"{place} has {'any value' if given is None else sorted(given - allowed)}, not only {sorted(allowed)}"
        for bound, sign in [(bound, 1) for bound in LOWER] + [(bound, -1) for bound in UPPER]:
            if bound in sup and (bound not in sub or sign * sub[bound] < sign * sup[bound]):
                yield f"{place} has {bound} {sub.get(bound)}, not {sup[bound]}"
        if sup.get("pattern") not in {None, sub.get("pattern")}:
            yield f"{place} has pattern {sub.get('pattern')}, not {sup['pattern']}"
        yield from self._of_items(sub, sup, place)
        if "properties" in sup or "additionalProperties" in sup:
            yield from self._of_objects(sub, sup, place)

    def _of_items(self, sub: Json, sup: Json, place: str) -> Iterator[str]:
        for at, (one, other) in enumerate(zip(sub.get("prefixItems", ()), sup.get("prefixItems", ()), strict=False)):
            yield from self.problems(one, other, f"{place}[{at}]")
        if "items" in sup:
            yield from self.problems(sub.get("items", {}), sup["items"], f"{place}[]")

    def _of_objects(self, sub: Json, sup: Json, place: str) -> Iterator[str]:
        named, known = sub.get("properties", {}), sup.get("properties", {})
        for name in sorted(set(sup.get("required", ())) - set(sub.get("required", ()))):
            yield f"{place}.{name} is {'not always there' if self.answers else 'required'}"
        for name, schema in named.items():
            if name in known:
                yield from self.problems(schema, known[name], f"{place}.{name}")
            elif sup.get("additionalProperties") is False:
                yield f"{place}.{name} is not taken any more"
        if self.answers:
            yield from (f"{place}.{name} is gone" for name in known if name not in named)
        if isinstance(more := sup.get("additionalProperties"), dict):
            yield from self.problems(sub.get("additionalProperties", {}), more, f"{place}.*")


def _values(schema: Json) -> set[str] | None:
    """The JSON of each value that is allowed; None if all are."""
    listed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    return None if listed is None else set(map(json.dumps, listed))
