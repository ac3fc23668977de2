"""Baselines that skip steps or parts of them: fewer steps, DeepCache, forecasts of the output."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ..attributes import replaced_attribute
from ..errors import MissingPackageError, PatchError
from ..patching.diffusers_internals import UNet2DConditionOutput
from ..patching.forecasts import lagrange_weights
from ..patching.layers import find_unet


@contextmanager
def fewer_steps(pipe: Any, num_inference_steps: int = 13) -> Iterator[Any]:
    """Run fewer denoising steps than requested.

    Args:
        pipe: A pipeline.
        num_inference_steps: Denoising steps, 1 or more.

    Yields:
        The pipeline, changed until the end of the block.

    Raises:
        PatchError: If ``pipe`` has no scheduler or the number is out of range.
    """
    if type(num_inference_steps) is not int or num_inference_steps < 1:
        raise PatchError(
            "fewer-steps: num_inference_steps must be a whole number above 0 "
            f"(got {num_inference_steps})"
        )
    find_unet(pipe)
    real = _scheduler(pipe, "fewer-steps").set_timesteps

    def set_timesteps(_: Any = None, *args: Any, **kwargs: Any) -> None:
        kwargs.pop("num_inference_steps", None)
        real(num_inference_steps, *args, **kwargs)

    with replaced_attribute(pipe.scheduler, "set_timesteps", set_timesteps):
        yield pipe


@contextmanager
def deepcache(pipe: Any, interval: int = 3) -> Iterator[Any]:
    """Reuse deep features with the DeepCache package (Ma et al., 2023, arXiv 2312.00858).

    Args:
        pipe: A pipeline; DeepCache needs its scheduler.
        interval: Steps between two full UNet calls, 2 or more.

    Yields:
        The pipeline, changed until the end of the block.

    Raises:
        MissingPackageError: If DeepCache is not installed.
        PatchError: If ``pipe`` has no scheduler or ``interval`` is out of range.
    """
    unet = find_unet(pipe)
    if type(interval) is not int or interval < 2:
        raise PatchError(f"deepcache: interval must be a whole number above 1 (got {interval})")
    _scheduler(pipe, "deepcache")
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError as error:
        raise MissingPackageError("DeepCache", "this baseline", "benchmark") from error
    before = {module: vars(module).get("forward") for module in unet.modules()}
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    try:
        helper.enable()
        yield pipe
    finally:
        # Its own disable() leaves bound methods behind.
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                vars(module)["forward"] = forward


def taylorseer(pipe: Any, interval: int = 3, order: int = 2) -> AbstractContextManager[Any]:
    """Extrapolate the UNet's output with a Taylor series of finite differences (as in TaylorSeer).

    Liu et al., *From Reusing to Forecasting*, 2025, arXiv 2503.06923, forecast features of each
    block; here only the output is forecast, so steps in between compute nothing.

    Args:
        pipe: A pipeline.
        interval: Steps between two UNet calls, 2 or more.
        order: Highest derivative, 0 to 4; 0 repeats the last output.

    Returns:
        A context manager that yields the pipeline, changed until the end of the block.

    Raises:
        PatchError: If ``pipe`` has no scheduler or a number is out of range.
    """
    if type(order) is not int or not 0 <= order <= 4:
        raise PatchError(f"taylorseer: order must be 0 to 4 (got {order})")

    def of_last(known: Sequence[float], x: float) -> list[float]:
        nodes = known[-1 - order :]
        return [0.0] * (len(known) - len(nodes)) + lagrange_weights(nodes, x)

    return _forecast_output(pipe, "taylorseer", interval, order + 1, of_last)


def spectrum(
    pipe: Any, interval: int = 3, degree: int = 4, ridge: float = 0.1
) -> AbstractContextManager[Any]:
    """Extrapolate the UNet's output with fitted Chebyshev polynomials (as in Spectrum).

    A ridge regression over all computed steps (arXiv 2603.01623), with steps scaled to [-1, 1].

    Args:
        pipe: A pipeline.
        interval: Steps between two UNet calls, 2 or more.
        degree: Degree of the polynomials, 1 to 16.
        ridge: Weight of the penalty, above 0.

    Returns:
        A context manager that yields the pipeline, changed until the end of the block.

    Raises:
        PatchError: If ``pipe`` has no scheduler or a number is out of range.
    """
    if type(degree) is not int or not 1 <= degree <= 16:
        raise PatchError(f"spectrum: degree must be 1 to 16 (got {degree})")
    if not ridge > 0:
        raise PatchError(f"spectrum: ridge must be above 0 (got {ridge})")

    def weights(known: Sequence[float], x: float) -> list[float]:
        scaled = np.array([*known, x]) / max(len(pipe.scheduler.timesteps) - 1, 1) * 2 - 1
        basis = np.polynomial.chebyshev.chebvander(scaled, degree)
        fitted, at = basis[:-1], basis[-1]
        return list(at @ np.linalg.solve(fitted.T @ fitted + ridge * np.eye(degree + 1), fitted.T))

    return _forecast_output(pipe, "spectrum", interval, 3, weights)


@contextmanager
def _forecast_output(
    pipe: Any,
    name: str,
    interval: int,
    first: int,
    weights: Callable[[Sequence[float], float], list[float]],
) -> Iterator[Any]:
    """Compute the first steps, then every ``interval``-th; in between, combine known outputs.

    Calls are counted from ``set_timesteps``, one per step.
    """
    unet, scheduler = find_unet(pipe), _scheduler(pipe, name)
    if type(interval) is not int or interval < 2:
        raise PatchError(f"{name}: interval must be a whole number above 1 (got {interval})")
    forward, set_timesteps = unet.forward, scheduler.set_timesteps
    known: dict[float, Tensor] = {}
    calls = [0]

    def begin(*args: Any, **kwargs: Any) -> None:
        known.clear()
        calls[0] = 0
        set_timesteps(*args, **kwargs)

    def call(*args: Any, **kwargs: Any) -> Any:
        step = calls[0]
        calls[0] += 1
        if len(known) < first or step - max(known) >= interval:
            out = forward(*args, **kwargs)
            known[step] = out[0]
            return out
        factors = weights(list(known), step)
        value = sum(w * v for w, v in zip(factors, known.values(), strict=True) if w)
        return (value,) if kwargs.get("return_dict") is False else UNet2DConditionOutput(value)

    with (
        replaced_attribute(scheduler, "set_timesteps", begin),
        replaced_attribute(unet, "forward", call),
    ):
        yield pipe


def _scheduler(pipe: Any, name: str) -> Any:
    if getattr(pipe, "scheduler", None) is None:
        raise PatchError(f"{name} needs a pipeline, for its scheduler")
    return pipe.scheduler
