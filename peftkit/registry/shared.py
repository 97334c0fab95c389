"""One base in memory and any number of stored deltas, of both kinds, on it.

Called by whoever serves or compares several deltas; stands on `registry.structures` and
`modeling.sharing`. The base is never written to: a delta's tensors are pointed to, not added.

Legend: B rows of a batch, C classes, T tokens, D width.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from peftkit.contracts import Delta
from peftkit.errors import RegistryError, suggestion
from peftkit.modeling.base import BaseConfig, resolve_base
from peftkit.modeling.sharing import Held, LiveBase
from peftkit.registry.fitting import BaseIdentity, held_by, model_spec
from peftkit.registry.forward import device_of, plain_model, run
from peftkit.registry.root import default_root
from peftkit.registry.store import Registry, StoredDelta
from peftkit.registry.structures import Structure, structure_key

SEQUENCE_CLASSIFICATION = "AutoModelForSequenceClassification"


@dataclass(frozen=True)
class Attached:
    """A delta on the base: where its tensors go, and the tensors."""

    stored: StoredDelta
    structure: Structure
    tensors: list[Tensor]

    @property
    def precision(self) -> str:
        """Accelerate's word for the mixed precision that it was trained in."""
        return str(self.stored.info.model["mixed_precision"])


class SharedBase:
    """A base, loaded once, under many deltas; it may be used from many threads.

    Which delta is active is each thread's own affair: a thread that never switched has the plain
    base. Calls take turns. Answers are in eval mode, without gradients, in the mixed precision
    that the delta was trained in, as float32.

    A plain base answers with the logits of its `auto_class` if its files hold that head (a
    language model), and with its last hidden states (B, T, D) if they do not.
    """

    def __init__(
        self,
        base: BaseConfig | Path | str,
        registry: Registry | None = None,
        *,
        held: Held | None = None,
        auto_class: str = SEQUENCE_CLASSIFICATION,
    ) -> None:
        """Find and load the base; `held` (float32 by default) is what every delta must match.

        Raises:
            SourceError: the base cannot be found, or does not have the class.
        """
        config = base if isinstance(base, BaseConfig) else BaseConfig(name=str(base))
        folder = resolve_base(config).path
        self.registry = registry or Registry(default_root())
        self.identity = BaseIdentity.of(folder)
        self._base = LiveBase(folder, held or Held())
        self._plain = plain_model(self._base, auto_class)
        self._attached: dict[str, Attached] = {}
        self._structures: dict[str, Structure] = {}
        self._lock = threading.RLock()
        self._thread = threading.local()

    @property
    def attached(self) -> list[str]:
        """References of the attached deltas, sorted."""
        with self._lock:
            return sorted(self._attached)

    @property
    def active(self) -> str | None:
        """Reference of this thread's active delta; None is the plain base."""
        return getattr(self._thread, "active", None)

    def stored(self, reference: str) -> StoredDelta:
        """What an attached delta's manifest says of it: task, labels, metrics."""
        with self._lock:
            return self._attached[self._resolved(reference)].stored

    def digest(self) -> str:
        """`sha256:<hex>` over the base's tensors as they are in memory now."""
        return self._base.digest()

    def attach(self, reference: str) -> str:
        """Verify a stored delta and add it; the active one stays.

        Returns:
            `name@v1`. A delta that is attached already stays as it is.

        Raises:
            RegistryError: unknown, damaged, trained on another base, tokenizer, quantisation or
                precision, or tensors that do not fit; nothing is added.
        """
        stored = self.registry.find(reference)
        name = f"{stored.name}@{stored.version}"
        if name not in self._attached:
            delta = self._verified(stored)
            try:
                with self._lock:
                    self._attached.setdefault(name, self._fitted(stored, delta))
            except RegistryError as error:
                lines = [f"{name}: {line.removeprefix('delta: ')}" for line in error.problems]
                raise RegistryError(lines) from error
        return name

    def _verified(self, stored: StoredDelta) -> Delta:
        problems = self.identity.problems(stored) + self._held_problems(stored)
        if not problems:
            return self.registry.read_delta(stored, base=self.identity.folder)
        try:
            self.registry.verify(stored)
        except RegistryError as error:
            problems += error.problems
        raise RegistryError(problems)

    def _held_problems(self, stored: StoredDelta) -> list[str]:
        wanted, own = held_by(stored.info), self._base.held
        pairs = {
            "quantisation": (wanted.quantisation, own.quantisation),
            "precision": (wanted.dtype, own.dtype),
        }
        return [
            f"{stored.name}@{stored.version}: trained over a base held in {what} {then}, "
            f"this one is in {now}"
            for what, (then, now) in pairs.items()
            if then != now
        ]

    def _fitted(self, stored: StoredDelta, delta: Delta) -> Attached:
        key = structure_key(stored.info, delta)
        structure = self._structures.get(key)
        if structure is None:
            spec = model_spec(stored.info)
            model = self._base.model(spec.auto_class, spec.config)
            structure = Structure(model, delta, self._base.held.dtype)
        attached = Attached(stored, structure, structure.fitted(delta))
        if structure.exchangeable:
            self._structures[key] = structure
        return attached

    def detach(self, reference: str) -> None:
        """Remove a delta; a thread in which it is active must switch before its next call.

        Raises:
            RegistryError: it is not attached.
        """
        with self._lock:
            name = self._resolved(reference)
            self._attached.pop(name).structure.clear(name)

    def switch(self, reference: str | None) -> None:
        """Make a delta this thread's active one; None is the plain base.

        Raises:
            RegistryError: it is not attached; the active one stays.
        """
        with self._lock:
            name = None if reference is None else self._resolved(reference)
            if name is not None:
                self._placed(name)
        self._thread.active = name

    @contextmanager
    def using(self, reference: str | None) -> Iterator["SharedBase"]:
        """Switch for the length of a `with` block, then back."""
        previous = self.active
        self.switch(reference)
        try:
            yield self
        finally:
            self._thread.active = previous

    def __call__(
        self, batch: Mapping[str, Tensor], deltas: Sequence[str | None] | None = None
    ) -> Tensor | list[Tensor]:
        """Answer for a collated batch; its `labels` are left aside.

        Args:
            batch: Tensors (B, …) as the task collates them.
            deltas: One reference or None for each row; by default all rows go to the active one.

        Returns:
            float32 logits (B, C), for question answering (B, T, 2) with starts before ends. With
            `deltas`, rows that differ in shape come as a list of B tensors.

        Raises:
            RegistryError: a delta is not attached, or another number of them than rows.
        """
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if deltas is None:
            return self._answer(self.active, inputs)
        rows = len(next(iter(inputs.values())))
        if len(deltas) != rows:
            raise RegistryError(f"deltas: {len(deltas)} for a batch of {rows} rows; give one a row")
        return self._mixed(inputs, deltas)

    def _mixed(
        self, inputs: dict[str, Tensor], deltas: Sequence[str | None]
    ) -> Tensor | list[Tensor]:
        """Rows that can go through one model together, the answers back in the batch's order."""
        found: dict[int, Tensor] = {}
        with self._lock:
            names = [None if delta is None else self._resolved(delta) for delta in deltas]
            groups = [self._group(name) for name in names]
            for group in dict.fromkeys(groups):
                rows = [row for row, other in enumerate(groups) if other == group]
                part = {key: tensor[rows] for key, tensor in inputs.items()}
                answers = self._rows([names[row] for row in rows], part)
                found |= dict(zip(rows, answers, strict=True))
        ordered = [found[row] for row in range(len(names))]
        same = len({answer.shape for answer in ordered}) == 1
        return torch.stack(ordered) if same else ordered

    def _group(self, name: str | None) -> object:
        """Equal for deltas that one forward can mix without a difference."""
        attached = self._attached[name] if name else None
        if attached is None or attached.structure.mixture is None:
            return name
        return id(attached.structure), attached.precision

    def _rows(self, names: list[str | None], inputs: dict[str, Tensor]) -> Tensor:
        owners = [name for name in names if name]
        if len(set(names)) == 1:
            return self._answer(names[0], inputs)
        attached = {owner: self._attached[owner] for owner in owners}
        first = attached[owners[0]]
        tensors = {owner: each.tensors for owner, each in attached.items()}
        forward = partial(first.structure.mixed, owners, tensors, inputs)
        return run(forward, first.precision, device_of(inputs))

    def _answer(self, name: str | None, inputs: dict[str, Tensor]) -> Tensor:
        with self._lock:
            if name is None:
                return run(partial(self._plain, **inputs), "no", device_of(inputs))
            attached = self._placed(name)
            model = attached.structure.model
            return run(partial(model, **inputs), attached.precision, device_of(inputs))

    def _placed(self, name: str) -> Attached:
        attached = self._attached[self._resolved(name)]
        attached.structure.place(name, attached.tensors)
        return attached

    def _resolved(self, reference: str) -> str:
        """`name@v1` of an attached delta; a bare name is enough where one version is attached."""
        if reference in self._attached:
            return reference
        versions = [name for name in self._attached if name.rpartition("@")[0] == reference]
        if len(versions) == 1:
            return versions[0]
        if versions:
            raise RegistryError(
                f"'{reference}': attached as {', '.join(sorted(versions))}; say which"
            )
        known = suggestion(reference, self._attached) if self._attached else "none is"
        raise RegistryError(f"'{reference}': no such delta is attached; {known}")
