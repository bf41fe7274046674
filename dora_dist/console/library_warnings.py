"""Silences warnings of libraries that do not concern the user of this program."""

import logging
import os
import sys
import warnings

from dora_dist.console.text import is_first_rank


def quiet_libraries() -> None:
    """Silence known warnings; commands call this (never at import) before the heavy imports.

    Only messages whose cause is understood are silenced.
    """
    # It offers a CPU kernel for inference, which training cannot use (see quantization.forbid_inference_packing).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT 0.21 asks transformers 5 for a renamed property; DeepSpeed 0.19 calls renamed collectives of torch 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor.*")
    # accelerate 1.15 passes DDP's broadcast_buffers to torch 2.13, which has renamed it.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers.*")
    # torch 2.13 warns that a change in place of a sharded module's output would lose a hook. It is silenced for the
    # whole model, whose own parameters are in no shard, and whose output is logits or a loss; for a layer, it stays.
    warnings.filterwarnings("ignore", category=UserWarning, message=r"FSDP2-wrapped module \(FSDP\w+For\w+\)")
    # accelerate 1.15 compares its own setting, which the Trainer leaves at 1, with DeepSpeed's; check_prepared compares
    # the settings that matter.
    logging.getLogger("accelerate.accelerator").addFilter(_is_no_known_mismatch)
    if not (is_first_rank() and sys.stderr.isatty()):
        _hide_progress_bars()
    if not is_first_rank():
        # A message that all ranks have is printed by one.
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()


def _is_no_known_mismatch(record: logging.LogRecord) -> bool:
    return "Gradient accumulation steps mismatch" not in record.getMessage()


def _hide_progress_bars() -> None:
    """Progress bars are for terminals: in a log, each state of a bar is a line."""
    # Environment variables, because the libraries are not imported yet: --help and configuration errors must be fast.
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS"):
        os.environ.setdefault(name, "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
    if "datasets" in sys.modules:
        from datasets.utils import disable_progress_bars

        disable_progress_bars()
