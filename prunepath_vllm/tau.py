"""The knob: what ``tau`` and ``sparsity`` mean, which values are valid, and how one becomes the other.

Pure Python, so that the server front end, the workers and the transformers side agree on every value.
"""

import math
import reprlib
import struct
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from prunepath_vllm.errors import TauError

MAX_TAU = 1.05
"""Upper end of the accepted range; the paper's warm-up writes 1.05 for "every expert"."""

MIN_FLOAT32 = 2.0**-126
"""The smallest normal float32, about 1.18e-38. Workers hold taus and thresholds in float32, where less is 0, or
may be taken for 0, and a tau of 0 marks padding, for which no expert runs."""

DENSE_TAU = 1.0
"""From here on a token uses every expert, by definition (not by comparing a cumulative sum)."""

AUTO_TAU = "auto"
"""A request's tau that leaves the choice to the server, which goes by its load; a range of taus does too."""

PARAMETERS = ("tau", "sparsity")
"""The names a request may use, as ``extra_args`` / ``extra_kwargs`` keys and as top-level HTTP body fields."""


def parse_tau(value: Any, parameter: str = "tau", *, max_tau: float | None = None) -> float:
    """Return `value` as a float in (0, 1.05]; 1.0 where it is so close to 1 that workers, in float32, see 1.

    Args:
        value: a number of Python, numpy or torch (of the latter two a scalar or 0-d array or tensor).
        parameter: what the error calls it.
        max_tau: of a checkpoint that keeps no weights of experts used above it alone; None for one that keeps all.

    Raises:
        TauError: `value` is not a number in range (bool, string, NaN and infinity are not), so small that float32 has
            no normal number for it, or above `max_tau`.
    """
    number = _parse_number(value)
    if number is None or not 0 < number <= MAX_TAU:
        raise _out_of_range(parameter, value, f"a number in (0, {MAX_TAU}]")
    if number < MIN_FLOAT32:
        raise _out_of_range(parameter, value, f"at least {MIN_FLOAT32}, the smallest normal float32")
    if max_tau is not None and float32(number) > float32(max_tau):
        limit = (
            f"a number in (0, {max_tau}], up to this checkpoint's max_tau: its weights are those of experts used there"
        )
        raise _out_of_range(parameter, value, limit)
    return _dense_as_workers_see_it(number)


def float32(number: float) -> float:
    """`number`, rounded to the nearest float32."""
    return struct.unpack("f", struct.pack("f", number))[0]


def _dense_as_workers_see_it(tau: float) -> float:
    """`tau`; 1.0 where float32 has nothing between, so that whoever asks whether a tau is dense hears the same."""
    return DENSE_TAU if float32(tau) == DENSE_TAU else tau


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
    """Return `value`, any number that :func:`parse_tau` would take as one, as a float in [0, 1): experts to leave out.

    Raises:
        TauError: `value` is not a number in range.
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
    if upper in (0, len(points)):
        return _dense_as_workers_see_it(points[0 if upper == 0 else -1][1])
    (s0, tau0), (s1, tau1) = points[upper - 1], points[upper]
    between = tau0 + (tau1 - tau0) * ((sparsity - s0) / (s1 - s0))
    return _dense_as_workers_see_it(max(between, tau1))  # rounding may pass the end by a bit


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
    max_tau: float | None = None,
) -> float:
    """Turn a request's extra arguments into the tau it runs at.

    Args:
        requested: the request's extra arguments; keys other than ``tau`` and ``sparsity`` are not looked at.
        default_tau: used where neither is present (or is ``None``).
        tau_curve: the checkpoint's measured curve, needed for ``sparsity``.
        max_tau: the checkpoint's, where it does not keep all experts.

    Raises:
        TauError: an invalid value, both at once, ``sparsity`` without a curve, or what needs a tau above `max_tau`.
    """
    tau, sparsity = ((requested or {}).get(name) for name in PARAMETERS)
    if sparsity is None:
        return default_tau if tau is None else parse_tau(tau, max_tau=max_tau)
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
    if max_tau is not None and target < (least := tau_curve[-1][1]):
        limit = f"at least {least}, what this checkpoint leaves out at its max_tau {max_tau}"
        raise _out_of_range("sparsity", sparsity, limit)
    return tau_for_sparsity(tau_curve, target)


def shown(value: Any) -> str:
    """`value` as an error message quotes it: at most 80 characters, however long it is or deep."""
    text = reprlib.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _parse_number(value: Any) -> float | None:
    try:
        # Scalars of numpy, 0-d arrays and tensors: told by their shape, as neither library is imported here.
        number = value.item() if getattr(value, "shape", None) == () else value
        if isinstance(number, bool) or not isinstance(number, Real):
            return None
        number = float(number)
    except (OverflowError, RuntimeError):  # too large; a tensor without a value, on the meta device
        return None
    return number if math.isfinite(number) else None


def _out_of_range(parameter: str, value: Any, expected: str) -> TauError:
    return TauError(f"{parameter} must be {expected}, got {shown(value)}", parameter=parameter, value=value)
