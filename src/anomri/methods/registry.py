"""The methods by name: `names`, `preset`, `build`, and `register` for one of your own.

A new method in this package is a file with a subclass of `base.Method` and a line in `PLACES`.
Another package names its class as an entry point of the group ``anomri.methods``. No method, nor
torch, is imported before it is used.
"""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any, get_type_hints

from anomri.errors import AnomriError

if TYPE_CHECKING:
    from anomri.methods.base import Method, Preset
    from anomri.spec import ModelSpec

GROUP = "anomri.methods"
PLACES = {
    "ae": "anomri.methods.ae:AE",
    "dae": "anomri.methods.dae:DAE",
    "diffusion": "anomri.methods.diffusion:Diffusion",
    "fanogan": "anomri.methods.fanogan:FAnoGAN",
    "thresholding": "anomri.methods.thresholding:Thresholding",
    "vae": "anomri.methods.vae:VAE",
    "vae-restoration": "anomri.methods.vae:VAERestoration",
}
"""Module and class of each method of this package, and of those that `register` added."""


def names() -> list[str]:
    """Names of all methods."""
    return sorted(_all_places())


def register(name: str, place: str) -> None:
    """Make a class known as the method ``name`` in this process.

    ``place`` is written ``module:Class``. The class is a subclass of `base.Method`. Raises
    `AnomriError` if another method has that name.
    """
    if _all_places().setdefault(name, place) != place:
        raise AnomriError(f"there is a method {name!r} already; choose another name.")
    PLACES[name] = place


def preset(method: str, name: str) -> Preset:
    """The preset ``name`` of a method; raises `AnomriError` with those that it has."""
    presets = load(method).PRESETS
    if name not in presets:
        raise AnomriError(f"{method} has no preset {name!r}; it has {', '.join(presets)}.")
    return presets[name]


def build(spec: ModelSpec) -> Method:
    """The method that ``spec`` describes, untrained.

    Raises `AnomriError` if its name or a setting is wrong.
    """
    method = load(spec.method)
    _check_settings(spec, method)
    try:
        return method(spec.channels, **spec.settings)
    except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise AnomriError(
            f"the settings {spec.settings} do not fit the method {spec.method}: {error}"
        ) from error


def load(name: str) -> type[Method]:
    """The class of a method.

    Raises `AnomriError` if there is none, or it is not a complete `base.Method`.
    """
    from importlib.metadata import EntryPoint

    from anomri.methods.base import Method

    # Entry points are looked up only if need be: that reads about all installed packages.
    place = PLACES.get(name) or _all_places().get(name)
    if place is None:
        raise AnomriError(f"there is no method {name!r}; the methods are {', '.join(names())}.")
    try:
        method = EntryPoint(name, place, GROUP).load()
    except (ImportError, AttributeError, ValueError) as error:
        raise AnomriError(
            f"the method {name!r} cannot be loaded from {place!r} ({error})."
        ) from error
    if not (isinstance(method, type) and issubclass(method, Method)):
        raise AnomriError(
            f"the method {name!r} is {place!r}, which is not a subclass of "
            "anomri.methods.base.Method."
        )
    missing = sorted(method.__abstractmethods__)
    if not hasattr(method, "PRESETS"):
        missing.append("PRESETS")
    if missing:
        raise AnomriError(f"the method {name!r} ({place}) lacks {', '.join(missing)}.")
    return method


def _check_settings(spec: ModelSpec, method: type[Method]) -> None:
    """Raise `AnomriError` for a setting that a method does not have, or of another type."""
    parameters = inspect.signature(method).parameters
    known = list(parameters)[1:]  # channels come first
    unknown = [name for name in spec.settings if name not in known]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    if unknown and not takes_any:
        raise AnomriError(
            f"{spec.method} has no setting {', '.join(unknown)}; it has "
            f"{', '.join(known) or 'none'}."
        )
    _check_types(spec, method)


def _check_types(spec: ModelSpec, method: type[Method]) -> None:
    from pydantic import PydanticUserError, TypeAdapter, ValidationError

    try:
        hints = get_type_hints(method.__init__)
    except (NameError, TypeError, AttributeError):
        # A method of another package may use types that only its type checker knows.
        return
    for name, value in spec.settings.items():
        try:
            # As in model.json, where a tuple is a list.
            TypeAdapter(hints.get(name, Any)).validate_json(json.dumps(value), strict=True)
        except (PydanticUserError, TypeError):
            continue
        except ValidationError as error:
            problem = error.errors()[0]["msg"]
            raise AnomriError(
                f"the setting {name} of {spec.method}: {problem[:1].lower()}{problem[1:]}; found "
                f"{value!r:.80}."
            ) from error


def _all_places() -> dict[str, str]:
    """Places of all methods; another package cannot replace one of these."""
    from importlib.metadata import entry_points

    return {point.name: point.value for point in entry_points(group=GROUP)} | PLACES
