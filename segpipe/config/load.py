"""One YAML text, flags and ``--set`` become one checked config; nothing is fetched here."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, Final, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from segpipe.config.model import SegpipeConfig
from segpipe.config.origins import FLAGS, SETS, Fault, Origins
from segpipe.errors import ConfigError
from segpipe.wording import few

MAX_TEXT_BYTES: Final = 1_000_000
MAX_DEPTH: Final = 16

RECIPE_PARTS: Final = ("prepare", "train", "predict", "evaluate")
"""Commands whose configs may stand in one file, below the key ``recipe``."""

_QUOTES: Final = "Correct it; text that begins with { or [ needs quotes."

Tree = dict[str, Any]
Config = TypeVar("Config", bound=BaseModel)


def load_config(
    text: str | None, overrides: Mapping[str, Any], sets: Sequence[str], where: str, part: str = "predict"
) -> SegpipeConfig:
    """The config of a run; ``part``: predict or evaluate. See ``load_model_config``."""
    return load_model_config(
        SegpipeConfig, text, overrides, sets, where, "See `segpipe config schema` for all keys.", part
    )


def load_model_config(
    model: type[Config],
    text: str | None,
    overrides: Mapping[str, Any],
    sets: Sequence[str],
    where: str,
    fix: str,
    part: str,
) -> Config:
    """A ``model`` from a YAML ``text``, then ``overrides`` (dotted key -> value), then ``sets`` ("a.b=c").

    A text with the one key ``recipe`` holds the configs of several commands, of which ``part`` is taken. An
    override of None is left out: the flag was not given. The value of a set is parsed as YAML. ``where``
    names the text in messages, ``fix`` tells where the keys are described. Raises ``ConfigError`` that lists
    every fault at once, each with the source it came from: unknown keys with the nearest valid one, and
    values that do not fit.
    """
    tree = _part_of(_parse_mapping(text, where), part, where) if text is not None else {}
    origins = Origins(tree, where)
    for key, value in overrides.items():
        if value is not None:
            _put(tree, key, value)
            origins.add(key, FLAGS)
    for item in sets:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"{item!r} is no setting", SETS, "Write it as section.key=value.")
        _put(tree, key.strip(), _set_value(model, key.strip(), value))
        origins.add(key.strip(), SETS)
    if faults := [*_unknown_keys(tree, model, model)]:
        place, what = origins.message(faults)
        raise ConfigError(what, place, fix)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        place, what = origins.message(_value_faults(model, error.errors(include_url=False)))
        raise ConfigError(what, place, fix) from None


def _part_of(tree: Tree, part: str, where: str) -> Tree:
    """The config of one command in a recipe; any other tree as it is."""
    if "recipe" not in tree:
        return tree
    if others := [str(name) for name in tree if name != "recipe"]:
        what = f"the key {others[0]} stands" if len(others) == 1 else f"the keys {few(others)} stand"
        raise ConfigError(
            f"{what} beside recipe", where, "All settings go into a command's part, such as recipe.predict."
        )
    parts = tree["recipe"]
    if not isinstance(parts, dict) or not set(parts) <= set(RECIPE_PARTS):
        raise ConfigError(
            f"a recipe holds the configs of {', '.join(RECIPE_PARTS)}, and nothing else",
            where,
            "Write `recipe: {train: {...}}`.",
        )
    if not isinstance(parts.get(part), dict):
        raise ConfigError(f"the recipe has no config of {part}", where, f"Add recipe.{part}.")
    chosen: Tree = parts[part]
    return chosen


def _set_value(root: type[BaseModel], key: str, value: str) -> Any:
    """The value of a set: YAML, but for a text field other than YAML text counts as it stands."""
    where = f"{SETS} {key}"
    if not _takes_text(root, key):
        return _parse_yaml(value, where)
    if value.lstrip().startswith("{"):
        return value.strip()
    parsed = _parse_yaml(value, where)
    return parsed if parsed is None or isinstance(parsed, str) else value.strip()


def _takes_text(root: type[BaseModel], dotted: str) -> bool:
    """Whether a key's field is plain text."""
    model: type[BaseModel] | None = root
    *sections, name = dotted.split(".")
    for part in sections:
        model = _section(model, part) if model is not None and part in model.model_fields else None
    field = model.model_fields.get(name) if model is not None else None
    return field is not None and _plain_types(field.annotation) <= {str, NoneType} != {NoneType}


def _plain_types(annotation: Any) -> set[Any]:
    """The types of a union, without what is annotated to them."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_plain_types, get_args(annotation)))
    return {annotation}


def _parse_mapping(text: str, where: str) -> Tree:
    loaded = _parse_yaml(text, where)
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"the config is {_type_name(loaded)}, not a mapping",
            where,
            "Write `section: {key: value}` lines.",
        )
    return loaded


def _parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 as plain values. Refused: doubled keys, anchors, aliases, tags, depth, size."""
    if len(text.encode("utf-8", "surrogatepass")) > MAX_TEXT_BYTES:
        raise ConfigError(
            f"the config is larger than {MAX_TEXT_BYTES} bytes", where, "Move lists to a list file."
        )
    try:
        _check_events(text, where)
        return _plain(YAML(typ="safe", pure=True).load(text), where)
    except ConfigError:
        raise
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"no valid YAML{place}: {error.problem or error.context}", where, _QUOTES) from None
    except (YAMLError, ValueError) as error:
        raise ConfigError(f"no valid YAML: {' '.join(str(error).split())}", where, _QUOTES) from None


def _check_events(text: str, where: str) -> None:
    """Look at the events before any object is built, so that no bomb is ever expanded."""
    depth = 0
    for event in YAML(typ="safe", pure=True).parse(text):
        name = type(event).__name__
        line = f"line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise ConfigError(f"an anchor or alias in {line}", where, "Write the value out where it is used.")
        if getattr(event, "tag", None) not in (None, "!"):
            raise ConfigError(f"a tag ({event.tag}) in {line}", where, "Write plain values without tags.")
        depth += name.endswith(("MappingStartEvent", "SequenceStartEvent"))
        depth -= name.endswith(("MappingEndEvent", "SequenceEndEvent"))
        if depth > MAX_DEPTH:
            raise ConfigError(f"nested deeper than {MAX_DEPTH} levels in {line}", where, "Flatten it.")


def _plain(value: Any, where: str) -> Any:
    """Mappings with text keys all the way down; a whole number as a key (a label value) becomes text."""
    if isinstance(value, dict):
        out: Tree = {}
        for key, item in value.items():
            if not isinstance(key, str) and (isinstance(key, bool) or not isinstance(key, int)):
                raise ConfigError(f"the key {key!r} is {_type_name(key)}", where, "Put it in quotes.")
            if str(key) in out:
                raise ConfigError(f"the key {key} stands there twice", where, "Keep one.")
            out[str(key)] = _plain(item, where)
        return out
    return [_plain(item, where) for item in value] if isinstance(value, list) else value


def _put(tree: Tree, dotted: str, value: Any) -> None:
    parts = dotted.split(".")
    for part in parts[:-1]:
        below = tree.get(part)
        if not isinstance(below, dict):
            below = tree[part] = {}
        tree = below
    tree[parts[-1]] = value


def _section(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The model of a field that is a section, else None."""
    annotation = model.model_fields[name].annotation
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All dotted keys of the config, sections too."""
    for name in model.model_fields:
        yield prefix + name
        below = _section(model, name)
        if below is not None:
            yield from _keys(below, f"{prefix}{name}.")


def _unknown_keys(
    tree: Tree, model: type[BaseModel], root: type[BaseModel], prefix: str = ""
) -> Iterator[Fault]:
    """One fault for each unknown key. Sections without a value count as left out."""
    for name in list(tree):
        if name not in model.model_fields:
            hint = _suggest(name, model, root, prefix)
            yield Fault(prefix + name, f"unknown key {prefix}{name}{hint}")
            continue
        below = _section(model, name)
        if below is None:
            continue
        if tree[name] is None:
            del tree[name]
        elif isinstance(tree[name], dict):
            yield from _unknown_keys(tree[name], below, root, f"{prefix}{name}.")


def _suggest(name: str, model: type[BaseModel], root: type[BaseModel], prefix: str) -> str:
    """The nearest valid key: a sibling, else any key of that name, else the dotted key most like it."""
    siblings = difflib.get_close_matches(name, list(model.model_fields), n=1)
    if siblings:
        return f" (did you mean {prefix}{siblings[0]}?)"
    by_leaf = {key.rpartition(".")[2]: key for key in reversed(list(_keys(root)))}
    leaf = difflib.get_close_matches(name, list(by_leaf), n=1)
    if leaf:
        return f" (did you mean {by_leaf[leaf[0]]}?)"
    dotted = difflib.get_close_matches(prefix + name, list(_keys(root)), n=1, cutoff=0.0)
    return f" (the nearest key is {dotted[0]})"


def _value_faults(root: type[BaseModel], errors: Sequence[ErrorDetails]) -> list[Fault]:
    """One fault a key: pydantic names each branch of a union, a reader wants them in one line."""
    whole: dict[str, Fault] = {}
    reasons: dict[str, list[str]] = {}
    got: dict[str, str] = {}
    for error in errors:
        if error["type"] == "value_error":  # a rule of ours, which names its own key
            section = ".".join(str(part) for part in error["loc"])
            rule = str(error.get("ctx", {}).get("error", error["msg"]))
            text = f"{section}.{rule}" if section else rule
            key, _, said = text.partition(": ")
            whole[text] = Fault(key, text, said)
            reasons.setdefault(text, [])
            continue
        key = _config_key(root, error["loc"])
        if error["type"] == "missing":
            text = f"{key}: is needed"
            whole[text] = Fault("", text)
            reasons.setdefault(text, [])
            continue
        reasons.setdefault(key, [])
        reason = _reason(error)
        if reason not in reasons[key]:
            reasons[key].append(reason)
        got[key] = _shorten(error["input"])
    return [
        whole.get(key) or Fault(key, f"{key}: must be {' or '.join(words)} (got {got[key]})")
        for key, words in reasons.items()
        if not any(other.startswith(f"{key}[") for other in reasons)  # an item's fault says more
    ]


def _config_key(root: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    """The dotted key of an error's place, without the names that pydantic gives to a union's branches."""
    model: type[BaseModel] | None = root
    parts: list[str] = []
    for part in loc:
        if model is not None and part in model.model_fields:
            parts.append(str(part))
            model = _section(model, str(part))
        elif isinstance(part, int) and parts:
            parts[-1] += f"[{part}]"
        elif parts and _is_free_mapping(root, parts):
            parts.append(str(part))
            break
    return ".".join(parts)


def _is_free_mapping(root: type[BaseModel], parts: Sequence[str]) -> bool:
    model = root
    for part in parts[:-1]:
        below = _section(model, part)
        if below is None:
            return False
        model = below
    field = model.model_fields.get(parts[-1])
    return field is not None and len(get_args(field.annotation)) == 2 and "dict" in str(field.annotation)


_REASONS: Final = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
    "too_short": "a list of at least {min_length}",
    "string_pattern_mismatch": "of the form {pattern}",
}


def _reason(error: ErrorDetails) -> str:
    known = _REASONS.get(error["type"])
    if known is None:
        return error["msg"].removeprefix("Input should be ")
    return known.format(**{name: value for name, value in error.get("ctx", {}).items() if name != "error"})


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "nothing" if value is None else f"of type {type(value).__name__}"
