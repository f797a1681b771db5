"""The knob: what ``tau`` and ``sparsity`` mean, which values are valid, and how one becomes the other.

Pure Python, so that the server front end, the workers and the transformers side agree on every value.
"""

import math
import reprlib
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prunepath_vllm.errors import TauError

MAX_TAU = 1.05
"""Upper end of the accepted range; the paper's warm-up writes 1.05 for "every expert"."""

DENSE_TAU = 1.0
"""From here on a token uses every expert, by definition (not by comparing a cumulative sum)."""

AUTO_TAU = "auto"
"""A request's tau that leaves the choice to the server, which goes by its load; a range of taus does too."""

PARAMETERS = ("tau", "sparsity")
"""The names a request may use, as ``extra_args`` / ``extra_kwargs`` keys and as top-level HTTP body fields."""


def parse_tau(value: Any, parameter: str = "tau") -> float:
    """Return `value` as a float in (0, 1.05].

    Raises:
        TauError: `value` is not a plain number in range (bool, string, NaN and infinity are not).
    """
    number = _parse_number(value)
    if number is None or not 0 < number <= MAX_TAU:
        raise _out_of_range(parameter, value, f"a number in (0, {MAX_TAU}]")
    return number


def parse_tau_list(text: str) -> list[float]:
    """Return the taus of a command line's list, separated by commas.

    Raises:
        TauError: not a number, or one out of range.
    """
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise _out_of_range("tau", text, "numbers separated by commas") from None
    return [parse_tau(number) for number in numbers]


def is_adaptive(value: Any) -> bool:
    """Whether a request's tau is meant to leave the choice to the server: ``"auto"``, or an object."""
    return isinstance(value, Mapping) or (isinstance(value, str) and value == AUTO_TAU)


def parse_tau_range(value: str | Mapping[str, Any], parameter: str = "tau") -> tuple[float, float] | None:
    """Return the ends of an adaptive tau's ``{"min": a, "max": b}``; None for ``"auto"``, whose ends are the server's.

    Raises:
        TauError: other keys, an end that is no tau, or ends that are crossed.
    """
    if isinstance(value, str):
        return None
    if set(value) != {"min", "max"}:
        forms = f'a number in (0, {MAX_TAU}], "{AUTO_TAU}" or {{"min": a, "max": b}} with a and b such numbers'
        raise _out_of_range(parameter, dict(value), forms)
    try:
        low, high = (parse_tau(value[end], f"{parameter}.{end}") for end in ("min", "max"))
    except TauError as error:
        raise TauError(str(error), parameter=parameter, value=error.value) from None
    if low > high:
        raise TauError(
            f"{parameter}.min must be at most {parameter}.max {high}, got {low}", parameter=parameter, value=low
        )
    return low, high


def parse_sparsity(value: Any, parameter: str = "sparsity") -> float:
    """Return `value` as a float in [0, 1), the share of experts to leave out.

    Raises:
        TauError: `value` is not a plain number in range.
    """
    number = _parse_number(value)
    if number is None or not 0 <= number < 1:
        raise _out_of_range(parameter, value, "a number in [0, 1)")
    return number


def tau_for_sparsity(tau_curve: Sequence[tuple[float, float]], sparsity: float) -> float:
    """Look up the tau whose measured FFN sparsity is `sparsity` by monotone linear interpolation.

    Args:
        tau_curve: (tau, FFN sparsity) pairs, ascending in tau, hence non-increasing in sparsity.
        sparsity: target in [0, 1). Targets outside the measured range give the curve's end.
    """
    # Ascending in sparsity. A sparsity measured at several taus keeps the largest tau: same cost, closest to dense.
    points: list[tuple[float, float]] = []
    for tau, measured in sorted(tau_curve, reverse=True):
        if not points or measured > points[-1][0]:
            points.append((measured, tau))
    upper = bisect_left(points, (sparsity, 0.0))
    if upper == 0:
        return points[0][1]
    if upper == len(points):
        return points[-1][1]
    (s0, tau0), (s1, tau1) = points[upper - 1], points[upper]
    return tau0 + (tau1 - tau0) * ((sparsity - s0) / (s1 - s0))


def level_curve(measured: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """A tau curve as configurations hold it, from measured (tau, FFN sparsity) pairs in ascending tau.

    What is measured at a lower tau is an upper bound, up to noise that the curve must not show.
    """
    curve: list[tuple[float, float]] = []
    for tau, sparsity in measured:
        bound = curve[-1][1] if curve else 1.0
        curve.append((tau, round(min(sparsity, bound), 4)))
    return curve


def resolve_tau(
    requested: Mapping[str, Any] | None,
    *,
    default_tau: float,
    tau_curve: Sequence[tuple[float, float]] | None,
) -> float:
    """Turn a request's extra arguments into the tau it runs at.

    Args:
        requested: the request's extra arguments; keys other than ``tau`` and ``sparsity`` are not looked at.
        default_tau: used where neither is present (or is ``None``).
        tau_curve: the checkpoint's measured curve, needed for ``sparsity``.

    Raises:
        TauError: an invalid value, both at once, or ``sparsity`` without a curve.
    """
    tau, sparsity = ((requested or {}).get(name) for name in PARAMETERS)
    if sparsity is None:
        return default_tau if tau is None else parse_tau(tau)
    if tau is not None:
        raise TauError(
            f"tau ({tau!r}) and sparsity ({sparsity!r}) were both given; expected one of them",
            parameter="sparsity",
            value=sparsity,
        )
    target = parse_sparsity(sparsity)
    if not tau_curve:
        raise TauError(
            f"sparsity ({sparsity!r}) needs a checkpoint with a measured tau_curve, and this one has none; "
            f"expected tau in (0, {MAX_TAU}], or run `prunepath calibrate` on the checkpoint",
            parameter="sparsity",
            value=sparsity,
        )
    return tau_for_sparsity(tau_curve, target)


def shown(value: Any) -> str:
    """`value` as an error message quotes it: at most 80 characters, however long it is or deep."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse_number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _out_of_range(parameter: str, value: Any, expected: str) -> TauError:
    return TauError(f"{parameter} must be {expected}, got {shown(value)}", parameter=parameter, value=value)
