"""Writes the folder of a run's adapter: the final one as a whole, and into that of a checkpoint what its run says."""

import shutil
from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dora_dist.adapter.card import complete_card
from dora_dist.base_model.load import BaseModelSpec
from dora_dist.config.parse import load_config
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM
from dora_dist.console.files import follow_umask
from dora_dist.console.text import say
from dora_dist.runs import records
from dora_dist.runs.adapter_folder.card import FOLDER_IN_CARD, card_of
from dora_dist.runs.adapter_folder.generation import Needed, write_settings
from dora_dist.runs.adapter_folder.use import Use


def write_adapter(
    folder: Path,
    run: Path,
    tokenizer: PreTrainedTokenizerBase,
    write: Callable[[Path], object],
    method: str | None = None,
) -> Needed:
    """Write the final adapter of a run; ``folder`` is complete or not there. Returns what the base lacks of it.

    Args:
        folder: is replaced.
        run: folder of the run, whose records say what the adapter is and how it is used.
        tokenizer: the tokenizer of its training.
        write: writes the adapter, and its card as far as the adapter itself says it, into the folder given.
        method: as of :func:`~dora_dist.runs.adapter_folder.card.card_of`.
    """
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    write(temporary)
    tokenizer.save_pretrained(temporary)
    needed = complete_adapter(temporary, run, method)
    follow_umask(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
    return needed


def complete_adapter(folder: Path, run: Path, method: str | None = None) -> Needed:
    """Let the folder of an adapter say what it is, in its card, and how it is used, by the records of its run so far.
    Returns what the base lacks of it.

    Args:
        folder: the adapter's folder, with its tokenizer.
        run: folder of the run, which may be going on.
        method: as of :func:`~dora_dist.runs.adapter_folder.card.card_of`.
    """
    config = load_config(run / records.CONFIG)
    use = Use.of(config, run)
    use.write(folder)
    needed = _write_settings(folder, config, use.chat)
    complete_card(folder, *card_of(run, config, needed.lines(FOLDER_IN_CARD), method))
    return needed


def _write_settings(folder: Path, config: RunConfig, chat: bool) -> Needed:
    """:func:`~dora_dist.runs.adapter_folder.generation.write_settings`, where a base that cannot be read any more is no
    reason to lose the adapter."""
    if config.task != CAUSAL_LM:
        return Needed()
    try:
        return write_settings(folder, BaseModelSpec.of(config.model, config.task), chat)
    except (OSError, ValueError) as error:
        say(
            f"{folder} has no generation_config.json, and its card does not say what a server must set, because the "
            f"base cannot be read: {error}"
        )
        return Needed()
