"""What `gatefuse scan` is asked about: a configuration or class of transformers, or a builder."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from gatefuse.scanning import ScanError

__all__ = ["Builder", "TargetError", "from_config_file", "from_name", "values_of"]

Builder = Callable[[], tuple[Any, tuple[Any, ...], dict[str, Any]]]
"""Makes a model and the arguments of one call of it."""


class TargetError(Exception):
    """What was named cannot be scanned. The message says why, in one line."""


def values_of(words: Sequence[str]) -> dict[str, Any]:
    """``["hidden_size=256", "model_type=x"]`` as a dict; values as Python or JSON would read them,
    anything else as text. TargetError on a word without ``=``."""
    values = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier():
            raise TargetError(f"{word!r} is not of the form name=value")
        values[name] = _value(text)
    return values


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def from_config_file(path: Path, overrides: dict[str, Any], tokens: int) -> Builder:
    """A model of transformers by its ``config.json``, or the folder with it.

    TargetError where there is none, it is not a configuration, or transformers is not installed.
    """
    transformers = _transformers()
    file = path / "config.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as e:
        raise TargetError(f"{path} cannot be read: {e.strerror}") from None
    except ValueError as e:
        raise TargetError(f"{file} is not JSON: {e}") from None
    if not isinstance(values, dict) or not isinstance(values.get("model_type"), str):
        raise TargetError(f'{file} is not a configuration of transformers: no "model_type" in it')
    kind = values.pop("model_type")
    try:
        config = transformers.AutoConfig.for_model(kind, **(values | overrides))
    except ValueError:
        raise TargetError(
            f"transformers {transformers.__version__} has no model type {kind!r}. Name a builder "
            "instead, as package.module:function"
        ) from None
    except Exception as e:
        raise TargetError(f"{file} is not a valid configuration of {kind}: {_line(e)}") from None
    return _of_config(config, tokens)


def from_name(name: str, values: dict[str, Any], tokens: int) -> Builder:
    """What ``package.module:name`` or ``file.py:name`` names: a configuration or model class of
    transformers, made of ``values``, or a builder, called with them.

    TargetError where there is no such thing, or it is none of these.
    """
    where, _, attribute = name.rpartition(":")
    found: Any = _module(where)
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{where} has no {attribute}")
        found = getattr(found, part)
    if not inspect.isclass(found):
        if not callable(found):
            raise TargetError(f"{name} is not a function")
        return _called(name, found, values)
    transformers = sys.modules.get("transformers")
    if transformers is not None and issubclass(found, transformers.PreTrainedConfig):
        return _of_config(_config(found, values), tokens)
    if transformers is not None and issubclass(found, transformers.PreTrainedModel):
        config_class = getattr(found, "config_class", None)
        if config_class is None:
            raise TargetError(f"{name} has no configuration class; name a model's own class")
        return _of_config(_config(config_class, values), tokens, found)
    raise TargetError(
        f"{name} is a class, and what its model is called with is not known. Name a function that "
        "returns the model and the arguments"
    )


def _called(name: str, function: Callable[..., Any], values: dict[str, Any]) -> Builder:
    try:
        inspect.signature(function).bind(**values)
    except TypeError as e:
        raise TargetError(f"{name} cannot be called so: {e}") from None

    def build() -> Any:
        result = function(**values)
        if not isinstance(result, tuple):
            raise ScanError(
                f"gatefuse: {name} returned only a {type(result).__name__}; expected (model, args) "
                "or (model, args, kwargs)"
            )
        return result

    return build


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise TargetError(
            "transformers is not installed here: pip install 'gatefuse[demo]'"
        ) from None


def _module(where: str) -> Any:
    if not where:
        raise TargetError("expected package.module:function, a script or --config FILE")
    if where == "transformers":
        return _transformers()
    sys.path.insert(0, "")  # as python -m does
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
        return module
    except FileNotFoundError:
        raise TargetError(f"there is no file {where}") from None
    except ModuleNotFoundError as e:
        raise TargetError(f"{where} cannot be imported: {e}") from None
    except Exception as e:
        raise TargetError(f"{where} fails when it is imported: {_line(e)}") from None
    finally:
        sys.path.remove("")


def _config(config_class: Any, values: dict[str, Any]) -> Any:
    try:
        return config_class(**values)
    except Exception as e:
        raise TargetError(
            f"{config_class.__name__} does not take these values: {_line(e)}"
        ) from None


def _of_config(config: Any, tokens: int, model_class: Any = None) -> Builder:
    """The language model of a configuration, in its dtype (by default bfloat16), and one call: a
    sequence of so many tokens, without a cache."""
    transformers = _transformers()
    if model_class is None:
        config = config.get_text_config(decoder=True)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # of the weights, of which there are none
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16

    def build() -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        auto = (transformers.AutoModelForCausalLM, transformers.AutoModel)
        if model_class is not None:
            model = model_class._from_config(config, dtype=dtype)
        else:
            known = [a for a in auto if type(config) in a._model_mapping]
            if not known:
                raise ScanError(
                    "gatefuse: transformers has no language model for "
                    f"{type(config).__name__}; name a model class or a builder"
                )
            model = known[0].from_config(config, dtype=dtype)
        parameters = inspect.signature(model.forward).parameters
        kwargs: dict[str, Any] = {"use_cache": False} if "use_cache" in parameters else {}
        name = getattr(model, "main_input_name", "input_ids")
        if name != "input_ids":
            raise ScanError(
                f"gatefuse: {type(model).__name__} takes {name}, no tokens. Name a builder, which "
                "returns the model and its arguments"
            )
        if getattr(config, "is_encoder_decoder", False):
            kwargs["decoder_input_ids"] = torch.zeros(1, tokens, dtype=torch.int64)
        return model, (), {"input_ids": torch.zeros(1, tokens, dtype=torch.int64), **kwargs}

    return build


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"
