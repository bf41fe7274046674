"""Messages of libraries that say nothing to a user of this one."""

import logging
import warnings

from dora_dist.console.text import is_first_rank


def quiet_libraries() -> None:
    """Silence known noise; to be called by commands (never at import) before the heavy imports.

    Only messages whose cause has been understood are named here, and only those.
    """
    # Offers a CPU kernel for inference, which training cannot use (see quantization.forbid_inference_packing).
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    # PEFT 0.21 asks transformers 5 for a renamed property; DeepSpeed 0.19 calls renamed collectives of torch 2.13.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*(all_gather_into|reduce_scatter)_tensor.*")
    # accelerate 1.15 hands DDP's broadcast_buffers on to torch 2.13, which has renamed it.
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*broadcast_buffers.*")
    if not is_first_rank():
        # What all ranks would say, one rank says.
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
