"""What the end of a run says of its adapter: where it is, how large, and the lines that use it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from shlex import quote
from typing import Any

from dora_dist.adapter.plain_lora import adapter_bytes
from dora_dist.config.adapter import PROMPT
from dora_dist.config.format_version import ADAPTER_CONFIG, ROUTED_ADAPTER
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.console.files import read_json
from dora_dist.console.text import format_bytes
from dora_dist.routing.files import TENSORS, is_routed
from dora_dist.runs.adapter_folder.card import how_to_scale
from dora_dist.runs.adapter_folder.generation import Needed


def describe_adapter(folder: Path, config: RunConfig) -> str:
    """Where the adapter of a finished run is, or how to make it again."""
    if folder.is_dir():
        return f"its adapter is {folder}"
    if config.adapter.routing == PROMPT:
        return "its adapter is gone: its checkpoints hold one each, which dora_dist.load_adapter reads"
    return f"its adapter is gone: dora-dist export {folder.parent} --checkpoint NAME makes one of a checkpoint"


def describe_size(run: Path, task: str) -> str:
    """How large the adapter of a finished run is, padded to one rank, and how large it would be without padding."""
    if is_routed(run / "adapter"):
        size = format_bytes((run / "adapter" / TENSORS).stat().st_size)
        return f"  {'adapter size':<16} {size}, routed by prompt: for dora-dist generate and dora_dist.load_adapter"
    padded, compact = map(format_bytes, adapter_bytes(run / "adapter"))
    hint = f" (dora-dist export {run} --format compact)" if task == CAUSAL_LM else ""
    return f"  {'adapter size':<16} {padded}, padded to one rank; {compact} with every module's own rank{hint}"


def describe_use(
    run: Path,
    task: str,
    labels: list[str] | str | None,
    positions: Mapping[str, Any] | None = None,
    needed: Needed | None = None,
) -> str:
    """The lines that load the adapter of a finished run, serve it and share it.

    Args:
        run: its folder.
        task: the run's task.
        labels: names of classes, or ``regression``; None where rows have no labels.
        positions: what places tokens in the base of the run, from :func:`~dora_dist.base_model.load.scaled_positions`.
        needed: what the base lacks of the adapter; None for nothing.
    """
    folder, needed = run / "adapter", needed or Needed()
    further = needed.lines(str(folder))
    shared = ("shared", f"hf upload USER/NAME {quote(str(folder))}     # with README.md, its model card")
    lines = []
    if positions is not None:
        merge = f"or merge the adapter (dora-dist export {quote(str(run))} --format merged)"
        lines.append(("first set", f"{how_to_scale(positions)}; {merge}"))
    if not is_routed(folder) and read_json(folder / ADAPTER_CONFIG).get("trainable_token_indices"):
        merged = f"merged (dora-dist export {quote(str(run))} --format merged): servers take no rows of new tokens"
        load = f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
        return _aligned([*lines, ("in Python", load), *further, ("served", merged), shared])
    if is_routed(folder):
        base, load = read_json(folder / ROUTED_ADAPTER)["base_model"], "dora_dist.load_adapter"
    else:
        base, load = read_json(folder / ADAPTER_CONFIG)["base_model_name_or_path"], "PeftModel.from_pretrained"
    outputs = "" if labels is None else f", num_labels={len(labels) if isinstance(labels, list) else 1}"
    lines += [("in Python", f"{load}({TASKS[task].auto_class}.from_pretrained({base!r}{outputs}), {str(folder)!r})")]
    lines += further
    if task == CAUSAL_LM and not is_routed(folder):
        rank = read_json(folder / ADAPTER_CONFIG)["r"]
        adapter = f"--max-lora-rank {rank} --lora-modules NAME={quote(str(folder))}"
        served = f"vllm serve {quote(base)} --enable-lora {adapter}{needed.vllm(quote(str(folder)))}"
        lines.append(("served by vLLM", served))
    return _aligned([*lines, shared])


def _aligned(lines: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"  {title:<16} {line}" for title, line in lines)
