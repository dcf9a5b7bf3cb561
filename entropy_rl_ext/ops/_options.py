"""Checks the numbers, texts and flags that an op takes beside its tensors."""

import functools
import inspect
import typing
from collections.abc import Callable, Sized
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from ._fakes import description

_Function = TypeVar("_Function", bound=Callable[..., Any])

# What an option of this type may be.
_ALLOWED: dict[type, tuple[tuple[type, ...], str]] = {
    float: ((Real, torch.SymFloat, torch.SymInt), "a number"),
    int: ((Integral, torch.SymInt), "an integer"),
    str: ((str,), "a text"),
}


def check_options(function: _Function) -> _Function:
    """Decorates an op: TypeError for an option of another type than its annotation, float, int, bool, str or Literal.

    PyTorch's own message has several lines and holds all data of a list. Tensors are checked by `check_tensors`, and
    what may be a number or a tensor by `check_number`.
    """
    parameters = inspect.signature(function).parameters
    options = {name: found for name, p in parameters.items() if (found := _option_type(p.annotation)) is not None}

    @functools.wraps(function)
    def checked(*args: Any, **keywords: Any) -> Any:
        # torch.compile cannot ask a symbolic number for its type.
        if torch.compiler.is_compiling():
            return function(*args, **keywords)
        given = dict(zip(parameters, args, strict=False)) | keywords
        for name, value in given.items():
            of, optional = options.get(name, (None, False))
            # Most are of that type itself, and a look at the type is ten times as fast as a check against Real.
            if of is not None and type(value) is not of and not (optional and value is None):
                given[name] = _option(name, value, of, " or None" if optional else "")
        return function(**given)

    return typing.cast(_Function, checked)


def host_number(value: float) -> Tensor:
    """A number as an op takes one that changes at every step: 0-dim float64 on the CPU."""
    if isinstance(value, int | float) and not torch.compiler.is_compiling():
        return torch.tensor(value, dtype=torch.float64, device="cpu")
    # torch.compile keeps a factor of a product symbolic; it would specialise on a fill value or a `float` argument.
    return torch.ones((), dtype=torch.float64, device="cpu") * value


def _option_type(annotation: Any) -> tuple[type, bool] | None:
    """(type, whether it may be None) of an option; None for another argument, such as a tensor."""
    choices = typing.get_args(annotation) or (annotation,)
    if typing.get_origin(annotation) is Literal:
        choices = (str,)
    of, *more = [choice for choice in choices if choice is not type(None)]
    return None if more or of not in (*_ALLOWED, bool) else (of, type(None) in choices)


def _option(name: str, value: Any, of: type, or_none: str) -> Any:
    """The value as the op takes it."""
    if of is bool:  # a number, or NumPy's bool
        fits, allowed = value is not None and not isinstance(value, Tensor | Sized), "True or False"
    else:
        types, allowed = _ALLOWED[of]
        fits = isinstance(value, types)
    if not fits:
        raise TypeError(f"{name} is {description(value)}; it must be {allowed}{or_none}")
    # A Scalar of a schema is none of NumPy's numbers.
    return float(value) if of is float and isinstance(value, Real) and not isinstance(value, int | float) else value
