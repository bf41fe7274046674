"""The fingerprint of a run: settings that are equal on all its ranks, and unchanged when it resumes."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

NAMES = {
    "engine": "distributed.engine",
    "num_steps": "optimizer steps",
    "global_batch": "global batch",
    "initial_rank": "initial rank",
    "batching": "data.batching",
    "data_order": "data order",
    "weights": "weights of model.path",
}
"""Field -> its name in files and messages, if the two differ."""
PREFIXES = {
    "model": "model.",
    "adapter": "adapter.",
    "pruning": "pruning.",
    "training": "training.",
    "examples": "examples of ",
    "held_out": "data.eval: examples of ",
    "evaluation": "evaluation.",
}
"""Field that holds several settings -> prefix of their names in files and messages."""


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """All settings of a run that a resumed run must not change. All values are plain JSON.

    Attributes:
        task: key ``task`` of the configuration.
        seed: key ``seed`` of the configuration.
        engine: key ``distributed.engine`` of the configuration.
        num_steps: optimizer steps of the whole run.
        global_batch: rows of one optimizer step, over all ranks and micro-batches.
        initial_rank: components of each adapted layer at the start.
        batching: key ``data.batching`` of the configuration.
        data_order: digest of the training plan.
        model: path, quantization, compute dtype (resolved: never ``auto``).
        adapter: the ``adapter`` section, with its seed resolved.
        pruning: the ``pruning`` section.
        training: the Trainer's settings that change the result.
        examples: name of a training source -> number and digest of its examples.
        weights: identity of the base's weights; None where it is not known, as in runs of earlier versions.
        labels: class names in the order of their numbers, or ``regression``; None for tasks without labels.
        held_out: name of a held-out source -> number and digest of its examples. Figures on other examples are not
            compared.
        evaluation: settings that decide what is measured on held-out data; empty without such data, and in older
            records.
        others: settings without a field: those of another method, or of another version of this program.
    """

    task: str
    seed: int
    engine: str
    num_steps: int
    global_batch: int
    initial_rank: int
    batching: str
    data_order: str
    model: Mapping[str, Any]
    adapter: Mapping[str, Any]
    pruning: Mapping[str, Any]
    training: Mapping[str, Any]
    examples: Mapping[str, str]
    weights: str | None = None
    labels: list[str] | str | None = None
    held_out: Mapping[str, str] = field(default_factory=dict)
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    others: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Every setting by its name in files and messages."""
        found: dict[str, Any] = {}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            if entry.name in PREFIXES:
                found |= {PREFIXES[entry.name] + name: setting for name, setting in value.items()}
            elif entry.name == "others":
                found |= value
            elif entry.name not in ("labels", "weights") or value is not None:
                found[NAMES.get(entry.name, entry.name)] = value
        return found

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any], where: object) -> "Fingerprint":
        """The fingerprint that :meth:`as_dict` wrote, by this version or an earlier one.

        Args:
            settings: name of a setting -> its value.
            where: the file with the settings, for the message.

        Raises:
            ValueError: a setting that every version writes is missing.
        """
        left = dict(settings)
        values: dict[str, Any] = {}
        for entry in dataclasses.fields(cls):
            name = NAMES.get(entry.name, entry.name)
            if prefix := PREFIXES.get(entry.name):
                members = [key for key in left if key.startswith(prefix)]
                values[entry.name] = {key.removeprefix(prefix): left.pop(key) for key in members}
            elif name in left:
                values[entry.name] = left.pop(name)
            elif entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING:
                raise ValueError(f"{where} lacks the setting {name!r}: the file is damaged, or no run wrote it")
        return cls(**values, others=left)

    def differences(self, current: "Fingerprint") -> list[str]:
        """The differences from another run, in words; empty if there are none. Three things are no difference: another
        engine, because each engine reads what the others have written; weights whose identity is known of one run only;
        and held-out data and evaluation, where this run had no held-out data."""
        if not self.held_out:
            current = dataclasses.replace(current, held_out={}, evaluation={})
        before, now = (json.loads(json.dumps(run.as_dict())) for run in (self, current))
        left_out = {NAMES["engine"]}
        if None in (self.weights, current.weights):
            left_out.add(NAMES["weights"])
        return [
            f"{name} was {before.get(name)!r} and is now {now.get(name)!r}"
            for name in sorted((before.keys() | now.keys()) - left_out)
            if before.get(name) != now.get(name)
        ]
