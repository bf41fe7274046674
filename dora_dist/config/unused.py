"""Keys that have no effect beside others. A value that the user sets there is a mistake, and is refused."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from dora_dist.config.adapter import PROMPT
from dora_dist.config.presets import default_of
from dora_dist.config.pruning import ABLATIONS, GROW, MODULES_PER_LAYER, MOVE, NONE, PRUNE, SUMMED

if TYPE_CHECKING:
    from dora_dist.config.run import RunConfig


def check_used(config: "RunConfig") -> None:
    """Refuse a value that nothing reads, unless the preset or, without it, the default has it too.

    With ``pruning.rule: none`` the other keys of the section are allowed: ``preset: lora`` turns a configuration into
    plain LoRA by one line.

    Raises:
        ValueError: names the key, its value and the key that decides.
    """
    for key, why in _unused(config):
        section, name = key.split(".")
        value = getattr(getattr(config, section), name)
        if value != default_of(key, config.preset):
            shown = str(value).lower() if isinstance(value, bool) else value
            raise ValueError(f"{key} is {shown}, which has no effect: {why}. Omit {key}, or change that")


def _unused(config: "RunConfig") -> Iterator[tuple[str, str]]:
    """Keys without an effect, and why."""
    rule, importance = config.pruning.rule, config.pruning.importance
    if rule == NONE:
        return
    of_rule = f"pruning.rule is {rule}"
    if rule == GROW:
        yield "pruning.importance", f"{of_rule}, which has a score of its own"
        yield "pruning.smoothing", f"{of_rule}, which has a score of its own"
    elif importance in (*SUMMED, *ABLATIONS):
        yield "pruning.smoothing", f"pruning.importance is {importance}, which is not smoothed"
    if rule != PRUNE:
        yield "pruning.regrow", f"{of_rule}, and only {PRUNE} brings components back"
        if config.pruning.equilibrium_weight:
            yield "pruning.equilibrium_weight", f"{of_rule}, and the modulator is for {PRUNE} alone"
    if rule != MOVE:
        yield "pruning.moved_per_event", f"{of_rule}, not {MOVE}"
    if rule != MODULES_PER_LAYER:
        yield "pruning.modules_per_layer", f"{of_rule}, not {MODULES_PER_LAYER}"
    if importance not in ABLATIONS:
        yield "pruning.scoring_rows", f"pruning.importance is {importance}, which takes no rows"
    if config.adapter.routing != PROMPT:
        yield "adapter.modules_per_prompt", f"adapter.routing is {config.adapter.routing}"
        yield "adapter.balance_weight", f"adapter.routing is {config.adapter.routing}"
