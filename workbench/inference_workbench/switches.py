"""The server's switches as a mapping: ``wb.features["kv_cache"]``, ``wb.features.kv_cache = False``.

Values come from the server. A write returns when the switch has taken effect, and raises when it was refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, MutableMapping
from typing import Any

import msgspec
import pandas as pd

from inference_server.features import FeatureError, FeatureValue, presets, validate
from inference_server.protocol import Cost, FeaturePreset, FeatureSpec
from inference_workbench.errors import FeatureRefusedError, RequestError
from inference_workbench.store import EventStore

Call = Callable[..., Any]
"""``call(method, path, json=…, timeout=…)``: one HTTP exchange, decoded."""
_SWITCH_TIMEOUT_S = 900.0
"""A switch to weights that are not packed yet waits for them."""


class AppliedSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """What a switch did, as measured by the engine."""

    epoch: int
    """Every later step carries this number."""
    values: dict[str, FeatureValue]
    changed: tuple[str, ...]
    cost: Cost
    apply_ns: int
    """How long the engine was held up."""
    preempted: int
    recompute_tokens: int

    def __repr__(self) -> str:
        if not self.changed:
            return "nothing to change"
        what = ", ".join(f"{name} = {self.values[name]}" for name in self.changed)
        text = f"{what} · epoch {self.epoch} · {self.cost} · applied in {self.apply_ns / 1e6:.2f} ms"
        if self.preempted:
            text += f" · interrupted {self.preempted} requests, {self.recompute_tokens} positions to compute again"
        return text


class _FeaturesAnswer(msgspec.Struct):
    epoch: int
    values: dict[str, FeatureValue]
    specs: tuple[FeatureSpec, ...]


class Switches(MutableMapping[str, FeatureValue]):
    """Read and throw the server's switches.

    Examples
    --------
    >>> wb.features.kv_cache = False
    >>> wb.features.update(kv_cache=True, max_num_seqs=8)
    >>> with wb.features.temporarily(kv_cache=False):
    ...     wb.generate("Once upon a time")
    """

    _call: Call
    _store: EventStore
    _specs: dict[str, FeatureSpec]
    _answered: tuple[str | None, int, dict[str, FeatureValue]] | None

    def __init__(self, call: Call, store: EventStore) -> None:
        # Plain attributes of this object are private; every other name is a feature's.
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_store", store)
        object.__setattr__(self, "_specs", {})
        object.__setattr__(self, "_answered", None)

    # -- reading -----------------------------------------------------------------------------------------------------

    def current(self) -> dict[str, FeatureValue]:
        """Return all values. From telemetry, unless the last answer of the server is newer."""
        told = self._store.features()
        answered = self._answered
        if told is not None and (answered is None or answered[0] != self._store.instance or told.epoch >= answered[1]):
            return dict(told.values)
        if answered is not None and answered[0] == self._store.instance:
            return dict(answered[2])
        return dict(self._fetch().values)

    def specs(self) -> dict[str, FeatureSpec]:
        """Return each feature's description, as the server gives it."""
        if not self._specs:
            self._fetch()
        return dict(self._specs)

    def presets(self) -> tuple[FeaturePreset, ...]:
        """Return the presets, with the values that this server can set."""
        return presets(self.specs().values())

    def describe(self) -> pd.DataFrame:
        """Return a table of the switches: value, default, what may be chosen, cost, description."""
        answer = self._fetch()
        rows = [
            {
                "feature": spec.name,
                "value": answer.values.get(spec.name),
                "default": spec.default,
                "choices": _choices(spec),
                "cost": spec.cost,
                "group": spec.group,
                "available": "yes" if spec.available else spec.unavailable_reason,
                "description": spec.description,
            }
            for spec in answer.specs
        ]
        return pd.DataFrame(rows).set_index("feature") if rows else pd.DataFrame()

    def __getitem__(self, name: str) -> FeatureValue:
        values = self.current()
        if name not in values:
            raise KeyError(_unknown(name, values))
        return values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.current())

    def __len__(self) -> int:
        return len(self.current())

    def __getattr__(self, name: str) -> FeatureValue:
        if name.startswith("_"):
            raise AttributeError(name)
        values = self.current()
        if name not in values:
            raise AttributeError(_unknown(name, values))
        return values[name]

    def __dir__(self) -> list[str]:
        return [*super().__dir__(), *self.specs()]

    # -- throwing ----------------------------------------------------------------------------------------------------

    def update(self, *args: Any, **values: Any) -> AppliedSwitch:  # type: ignore[override]
        """Throw several switches between the same two steps.

        Returns
        -------
        AppliedSwitch
            What was changed and what it cost.

        Raises
        ------
        FeatureRefusedError
            If a name or value is not allowed. Nothing was changed then.
        """
        return self._apply({**dict(*args), **values})

    def preset(self, name: str) -> AppliedSwitch:
        """Throw the switches of a preset together: ``"naive"``, ``"vllm-like"`` or ``"everything"``.

        Parameters
        ----------
        name
            One of ``presets()``.

        Returns
        -------
        AppliedSwitch
            What was changed and what it cost.

        Raises
        ------
        FeatureRefusedError
            If there is no such preset.
        """
        known = {preset.name: preset.values for preset in self.presets()}
        if name not in known:
            raise FeatureRefusedError(f"There is no preset {name!r}. The presets are: {', '.join(known)}.")
        return self._apply(known[name])

    def __setitem__(self, name: str, value: FeatureValue) -> None:
        self._apply({name: value})

    def __setattr__(self, name: str, value: FeatureValue) -> None:
        self._apply({name: value})

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name!r} cannot be deleted; set it to its default: {self.specs()[name].default!r}")

    @contextlib.contextmanager
    def temporarily(self, **values: FeatureValue) -> Iterator[AppliedSwitch]:
        """Throw switches for the length of a ``with`` block, then put the former values back."""
        before = self.current()
        applied = self._apply(values)
        try:
            yield applied
        finally:
            self._apply({name: before[name] for name in values})

    def _apply(self, values: dict[str, Any]) -> AppliedSwitch:
        specs = self.specs()
        try:
            for name, value in values.items():
                validate(name, value, specs)
        except FeatureError as error:
            raise FeatureRefusedError(str(error)) from None
        try:
            answer = self._call("PATCH", "/features", json=values, timeout=_SWITCH_TIMEOUT_S)
        except RequestError as error:
            raise FeatureRefusedError(str(error)) from error
        applied = msgspec.convert(answer, AppliedSwitch)
        object.__setattr__(self, "_answered", (self._store.instance, applied.epoch, applied.values))
        return applied

    def _fetch(self) -> _FeaturesAnswer:
        answer = msgspec.convert(self._call("GET", "/features"), _FeaturesAnswer)
        object.__setattr__(self, "_specs", {spec.name: spec for spec in answer.specs})
        object.__setattr__(self, "_answered", (self._store.instance, answer.epoch, answer.values))
        return answer

    def __repr__(self) -> str:
        return "\n".join(f"{name:<28} {value}" for name, value in self.current().items())

    def _repr_html_(self) -> str:
        return self.describe().to_html()


def _choices(spec: FeatureSpec) -> str:
    match spec.kind:
        case "bool":
            return "True, False"
        case "int":
            return f"{spec.minimum} … {spec.maximum}"
        case "choice":
            return ", ".join(spec.choices)


def _unknown(name: str, values: dict[str, FeatureValue]) -> str:
    return f"There is no feature {name!r}. The features are: {', '.join(sorted(values))}."
