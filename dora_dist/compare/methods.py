"""The methods that can be compared."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dora_dist.config.checks import nearest
from dora_dist.config.training import LORA_PLUS_RATIO

LORA = "lora"
ADALORA = "adalora"
EVA = "eva"
PEER_TITLES = {ADALORA: "PEFT's AdaLoRA", EVA: "PEFT's EVA"}
"""Methods that PEFT trains -> their names in messages."""
DYNAMIC = "dynamic"
SECTIONS = ("adapter", "pruning", "training")
OF_TRAINING = (LORA_PLUS_RATIO,)
"""Keys of the training section that a method may set for itself."""
FROM = "from"
RANK_PER_BUDGET = "rank_per_budget"
READ_BY_PEERS: Mapping[str, Mapping[str, Sequence[str]]] = {
    ADALORA: {
        "adapter": ("initial_rank", "target_modules"),
        "pruning": ("warmup_fraction", "final_fraction", "interval"),
    },
    EVA: {"adapter": ("calibration_rows", "target_modules"), "pruning": ()},
}
"""Keys that a method of PEFT reads of a method's own sections."""
PLAIN: Mapping[str, Mapping[str, Any]] = {
    "adapter": {"init": "lora", "train_gates": False},
    "pruning": {"rule": "none"},
}
"""Settings that switch the method off, whatever the comparison's run sets for the others."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """What a method changes in the comparison's run.

    Attributes:
        name: name of the method.
        says: description for the table.
        uniform: whether the initial rank is the target rank, so that nothing is pruned.
        peer: the PEFT method that is trained instead, a key of :data:`PEER_TITLES`; None for a run of this project.
        rank_per_budget: ratio of the adapter's target rank to the budget. With ``adapter.routing: prompt``, set it to
            the modules of a block over the modules per prompt: a prompt then uses as many parameters as the baseline.
        sections: changes to ``adapter``, ``pruning`` and the keys :data:`OF_TRAINING` of ``training``.
    """

    name: str
    says: str
    uniform: bool = False
    peer: str | None = None
    rank_per_budget: float = 1.0
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _ablation(name: str, says: str, **pruning: Any) -> Method:
    return Method(name=name, says=says, sections={"pruning": pruning})


BUILT_IN = {
    method.name: method
    for method in (
        Method(
            name=LORA,
            says="LoRA of one rank for all layers",
            uniform=True,
            sections=PLAIN,
        ),
        Method(name=ADALORA, says="PEFT's AdaLoRA, one process", peer=ADALORA),
        Method(
            name=EVA,
            says="PEFT's EVA, one process",
            uniform=True,
            peer=EVA,
            sections=PLAIN,
        ),
        Method(name=DYNAMIC, says="this method, as configured"),
        _ablation("no-dem", "without the Dimensional Equilibrium Modulator", equilibrium_weight=0.0),
        _ablation("no-smoothing", "scores of the last step only", smoothing=0.0),
        _ablation("hard-prune", "pruned components stay pruned", regrow=False),
        _ablation("random", "components chosen at random", importance="random"),
        _ablation("magnitude", "norms not divided by that of their layer", importance="magnitude"),
        _ablation("sensitivity", "first-order effect on the loss", importance="gate_sensitivity"),
        _ablation("by-parameters", "budget counted in parameters", budget_unit="parameters"),
    )
}


def methods_of(entries: Sequence[str | Mapping[str, Any]]) -> dict[str, Method]:
    """Methods by name, in their order.

    Args:
        entries: names of built-in methods, or ``{name: {from: built-in, adapter: ..., pruning: ...}}``.

    Raises:
        ValueError: there is no such method, or its description is invalid.
    """
    return {method.name: method for method in map(_method, entries)}


def _method(entry: str | Mapping[str, Any]) -> Method:
    if isinstance(entry, str):
        if entry not in BUILT_IN:
            raise ValueError(
                f"methods has {entry!r}, which is no built-in method{nearest(entry, BUILT_IN)} (there are "
                f"{', '.join(BUILT_IN)}); describe one of your own as {{name: {{from: dynamic, pruning: ...}}}}"
            )
        return BUILT_IN[entry]
    if len(entry) != 1:
        raise ValueError(f"methods has {dict(entry)}, but an entry is a name, or one {{name: {{...}}}}")
    ((name, described),) = entry.items()
    if not isinstance(described, Mapping):
        raise ValueError(f"methods has {name}: {described!r}, but its value must be {{from: ..., adapter: ...}}")
    if name in BUILT_IN:
        raise ValueError(f"methods describes {name}, which is a built-in method: give yours another name")
    known = (FROM, RANK_PER_BUDGET, *SECTIONS)
    for key in described:
        if key not in known:
            raise ValueError(
                f"unknown key methods.{name}.{key}{nearest(key, known)}: a method has {', '.join(known)}; everything "
                "else must be the same for all methods"
            )
    parent = _method(str(described.get(FROM, DYNAMIC)))
    factor = described.get(RANK_PER_BUDGET, parent.rank_per_budget)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < math.inf:
        raise ValueError(f"methods.{name}.{RANK_PER_BUDGET} is {factor!r}, but must be a positive number")
    sections = {}
    for section in SECTIONS:
        own = described.get(section, {})
        if not isinstance(own, Mapping):
            raise ValueError(
                f"methods.{name}.{section} is {own!r}, but must be a section of the configuration of a run"
            )
        for key in own:
            if flaw := _flaw_of_key(parent, section, key):
                raise ValueError(f"methods.{name}.{section}.{key} is set, but {flaw}")
        sections[section] = {**parent.sections.get(section, {}), **own}
    changes = [f"{RANK_PER_BUDGET} {factor:g}"] * (factor != parent.rank_per_budget)
    changes += [f"{key} {value}" for section in SECTIONS for key, value in described.get(section, {}).items()]
    return Method(
        name=name,
        says=f"{parent.name}, {', '.join(changes) or 'unchanged'}",
        uniform=parent.uniform,
        peer=parent.peer,
        rank_per_budget=factor,
        sections=sections,
    )


def _flaw_of_key(parent: Method, section: str, key: str) -> str | None:
    """Why a method that is derived from this one cannot set a key; None where it can."""
    if section == "training":
        if key not in OF_TRAINING:
            only = ", ".join(OF_TRAINING)
            return f"a method may set only {only} of training; everything else must be the same for all methods"
    elif (section, key) == ("adapter", "dropout"):
        return "dropout must be the same for all methods: set run.adapter.dropout"
    elif (section, key) == ("adapter", "initial_rank") and parent.uniform:
        return f"{parent.name} starts with its target rank: remove it, or set {RANK_PER_BUDGET}"
    elif parent.peer is not None and key not in (read := READ_BY_PEERS[parent.peer][section]):
        title = PEER_TITLES[parent.peer]
        return f"{title} does not read it: remove it (of {section} it reads {', '.join(read) or 'nothing'})"
    return None
