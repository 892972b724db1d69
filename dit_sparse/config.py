"""The settings of sparse attention, in code and in JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from dit_sparse.kernels.ops import check_impl, check_precision
from dit_sparse.methods import Method, method_class
from dit_sparse.methods.compensated_delta import CompensatedDelta

VERSION = 1
# The method where none is named.
DEFAULT: type[Method] = CompensatedDelta


@dataclass(frozen=True)
class SparseConfig:
    """Everything that decides what sparse attention computes.

    Attributes:
        method: A :class:`~dit_sparse.methods.base.Method`.
        dense_layers: Self-attention layers, by index in execution order, that stay dense.
        impl: Kernel to use: ``"auto"`` or a name, which then never falls back.
        attention_precision: What products of sparse attention are computed in: ``"model"``, the
            model's dtype; ``"fp8_qk"``, queries and keys in 8 bits; ``"fp8_qkpv"``, weights and
            values too (:mod:`dit_sparse.kernels.fp8`). Dense steps with all that is kept from them,
            dense refreshes, searches and summaries stay in the model's dtype.
        dense_padding: What dense steps do with padded text. ``"keep"`` passes the model's mask on:
            bit for bit upstream, but scaled_dot_product_attention is slow with a mask and many
            backends refuse one. ``"trim"`` cuts the padding off and passes no mask: equal up to
            rounding, and the whole choice of fast backends.
        strict: Whether to raise RuntimeError instead of warning once where something is not as
            asked: a loss of sparsity that nobody asked for, such as another call replacing the
            processors, or a step cache that caches nothing or mixes passes up.

    Raises:
        ValueError: On an unknown ``impl``, ``attention_precision`` or ``dense_padding``, a layer
            index that is not an int >= 0, or a ``strict`` that is not a bool.
        Unsupported: If the named ``impl`` needs a package that is not installed.
    """

    method: Method = field(default_factory=DEFAULT)
    dense_layers: tuple[int, ...] = ()
    impl: str = "auto"
    dense_padding: str = "keep"
    strict: bool = False
    attention_precision: str = "model"

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise ValueError(
                f"method must be a Method such as AdaSpa(sparsity=0.8), got {self.method!r}; "
                "for a name use SparseConfig.from_name"
            )
        if any(not isinstance(layer, int) or layer < 0 for layer in self.dense_layers):
            raise ValueError(f"dense_layers must be ints >= 0, got {self.dense_layers!r}")
        if self.dense_padding not in ("keep", "trim"):
            raise ValueError(f"dense_padding must be 'keep' or 'trim', got {self.dense_padding!r}")
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict must be True or False, got {self.strict!r}")
        check_precision(self.attention_precision)
        check_impl(self.impl)

    @classmethod
    def from_name(cls, name: str, **options: Any) -> SparseConfig:
        """A configuration from a method's name and options of the method or of this class.

        Raises:
            ValueError: On an unknown method or option; names the accepted ones.
        """
        shared = {f.name for f in fields(cls)} - {"method"}
        outer = {key: options.pop(key) for key in list(options) if key in shared}
        kind = method_class(name)
        _check_keys(options, {f.name for f in fields(kind)} | shared, f"method {kind.name!r}")
        return cls.from_dict({"version": VERSION, "method": {"name": name, **options}, **outer})

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; :meth:`from_dict` restores an equal object."""
        method = {f.name: getattr(self.method, f.name) for f in fields(self.method)}
        return {
            "version": VERSION,
            "method": {"name": self.method.name, **_plain(method)},
            "dense_layers": list(self.dense_layers),
            "impl": self.impl,
            "dense_padding": self.dense_padding,
            "strict": self.strict,
            "attention_precision": self.attention_precision,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SparseConfig:
        """Restores :meth:`to_dict`.

        Raises:
            ValueError: On another version, an unknown key or an unknown method.
        """
        if not isinstance(data, dict) or not isinstance(data.get("method"), dict):
            raise ValueError(
                "a sparse attention config is an object with 'version' and 'method' "
                f"({{'name': ...}}), got {data!r}"
            )
        if data.get("version") != VERSION:
            raise ValueError(
                f"config version must be {VERSION}, got {data.get('version')!r}; save it again "
                "with this release of dit-sparse"
            )
        outer = {key: value for key, value in data.items() if key not in ("version", "method")}
        _check_keys(outer, {f.name for f in fields(cls)} - {"method"}, "config")
        options = {key: value for key, value in data["method"].items() if key != "name"}
        kind = method_class(data["method"].get("name", ""))
        _check_keys(options, {f.name for f in fields(kind)}, f"method {kind.name!r}")
        return cls(method=kind(**_frozen(options)), **_frozen(outer))

    def save(self, path: str | Path) -> None:
        """Writes the configuration as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> SparseConfig:
        """Reads a configuration that :meth:`save` wrote.

        Raises:
            ValueError: If the file is not JSON, or as :meth:`from_dict`.
            FileNotFoundError: If there is no such file.
        """
        try:
            data = json.loads(Path(path).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        return cls.from_dict(data)


def _check_keys(given: dict[str, Any], known: set[str], what: str) -> None:
    unknown = sorted(set(given) - known)
    if unknown:
        hint = ""
        if "sparsity" in unknown and "density" in known:
            hint = "; its density is the share of blocks kept, 1 - sparsity"
        raise ValueError(f"{what} accepts {sorted(known)}, got unknown {unknown}{hint}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
