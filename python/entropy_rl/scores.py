"""Numbers for each token: what ranks the tokens of a selection, `entropy_top_score` (their entropy, surprisal, a random
number or a function of the user's), and `token_weight`, a function of the user's.
"""

import functools
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropy_rl.errors import UserError
from entropy_rl.functions import import_function, what_it_raised
from entropy_rl_ext.ops.covariance_mask import random_numbers

SCORES = ("entropy", "surprisal", "random")
FUNCTION = "FILE.py:function"  # what a value that names a function looks like

# The draw of a score must not be that of clip_cov, which may get the same seed.
_SALT = 0x2545F4914F6CDD1D


def names_function(value: Any) -> bool:
    """Whether a value of the configuration has the form of FUNCTION."""
    return isinstance(value, str) and re.fullmatch(r".+\.py:[^\W\d]\w*", value) is not None


def token_scores(
    score: str, log_prob: Tensor, entropy: Tensor, advantages: Tensor | None, response_mask: Tensor
) -> Tensor:
    """[B, S]: the score of each token, for every score but random."""
    if score == "entropy":
        return entropy
    if score == "surprisal":
        return -log_prob
    return token_function("entropy_top_score", score)(log_prob, entropy, advantages, response_mask)


def random_scores(seed: Tensor, response_mask: Tensor, before: Tensor) -> Tensor:
    """Uniform random numbers in [0, 1), float64, of the shape of `response_mask`.

    The number of a token depends on the seed, [] int64, and on its place: it is response token number `before` + i of
    the step if it is number i of the mask. `before`, [] int64, counts those of earlier ranks and micro-batches.
    """
    place = (response_mask != 0).flatten().cumsum(0).view(response_mask.shape) - 1 + before
    return random_numbers(seed ^ _SALT, place) * 2.0**-53


class TokenFunction:
    """A function in a user's file that gives each token a number; for the key `token_weight` a weight, 0 or above.

    It is called with log_prob, entropy, advantages and response_mask, all [B, S] without gradient, and returns
    [B, S]. Numbers outside the response mask are ignored.

    Raises:
        UserError: there is no such function; or, at a call, it raises, or returns something else, another shape, NaN
            or a weight below 0.
    """

    def __init__(self, key: str, value: str) -> None:
        self._where, self._weighs = f"{key}={value}", key == "token_weight"
        path, _, name = value.rpartition(":")
        module_name = f"entropy_rl_{key.replace('.', '_')}_{Path(path).stem}"
        self._function = import_function(path, name, module_name, path_key=self._where, name_key=self._where)

    @torch.no_grad()
    def __call__(self, log_prob: Tensor, entropy: Tensor, advantages: Tensor | None, response_mask: Tensor) -> Tensor:
        try:
            result = self._function(log_prob.detach(), entropy.detach(), advantages, response_mask)
        except Exception as error:
            raise UserError(f"{self._where}: {what_it_raised(error)}") from None
        shape = list(entropy.shape)
        if not isinstance(result, Tensor):
            self.fail(f"it returned a {type(result).__name__}; a tensor of shape {shape} was expected")
        if result.shape != entropy.shape or result.is_complex() or result.device != entropy.device:
            found = (
                f"{str(result.dtype).removeprefix('torch.')} tensor of shape {list(result.shape)} on {result.device}"
            )
            self.fail(f"it returned a {found}; a tensor of numbers of shape {shape} on {entropy.device} was expected")
        result = result.detach().to(torch.float64 if result.dtype == torch.float64 else torch.float32)
        inside = response_mask != 0
        wrong = ~(result.isfinite() & (result >= 0)) if self._weighs else result.isnan()
        count = int((wrong & inside).sum())
        if count:
            what = "a weight below 0 or not finite" if self._weighs else "NaN"
            self.fail(f"it returned {what} for {count} of {int(inside.sum())} response tokens")
        return result

    def fail(self, reason: str) -> None:
        raise UserError(f"{self._where}: {reason}")


@functools.cache
def token_function(key: str, value: str) -> TokenFunction:
    """The function that a key names. Its file is imported once."""
    return TokenFunction(key, value)
