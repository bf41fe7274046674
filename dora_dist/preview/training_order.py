"""The order of training: which example is seen in which optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dora_dist.config.run import RunConfig
from dora_dist.config.training import length_of_run, whole_number

if TYPE_CHECKING:
    import numpy as np

    from dora_dist.data.mixture import Mixture


@dataclass(frozen=True)
class TrainingOrder:
    """The order in which training sees examples.

    Attributes:
        examples: indices of the examples in the order of training.
        steps: optimizer step of each example; None if no training is possible.
        remarks: the number of steps and how it is computed.
    """

    examples: "np.ndarray"
    steps: "np.ndarray | None"
    remarks: Sequence[str]


def build_course(config: RunConfig, mixture: "Mixture", world_size: int, flaw: str) -> TrainingOrder:
    """The order of training; ``flaw`` is the reason why there is none, or empty."""
    import numpy as np

    from dora_dist.setup.training_arguments import count_steps

    rows_per_batch, accumulation = (
        whole_number(config.training, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    max_steps, epochs = length_of_run(config.training)
    batch = rows_per_batch * accumulation * world_size
    try:
        num_steps = 0 if flaw else count_steps(mixture, max_steps, epochs, batch)
    except ValueError as error:
        flaw = str(error)
    if flaw:
        remark = f"no optimizer step: training would stop with the error: {flaw}"
        return TrainingOrder(mixture.order(sum(mixture.counts)), None, [remark])
    plan = mixture.plan(num_steps, batch)
    padding = (
        f"padding: {plan.padding_share(mixture.lengths, rows_per_batch):.1%} of the computed tokens (data.batching "
        f"{mixture.batching}, {rows_per_batch} rows a micro-batch)"
    )
    processes = f"{world_size} process" + "es" * (world_size > 1)
    divisor = f"({rows_per_batch} per device x {accumulation} accumulated x {processes})"
    count = _explain_steps(mixture, num_steps, batch, None if max_steps > 0 else epochs, divisor)
    step_of_row = np.repeat(np.arange(1, num_steps + 1), batch)
    return TrainingOrder(
        plan.examples,
        np.repeat(step_of_row, np.diff(plan.starts)),
        [padding, f"{count}; computed for {processes} (--world-size)"],
    )


def _explain_steps(mixture: "Mixture", num_steps: int, batch: int, epochs: float | None, divisor: str) -> str:
    """Explains the number of steps by the epochs, or by ``max_steps`` if ``epochs`` is None."""
    rows = mixture.rows_per_epoch
    of = f"{rows:,} rows" + " of packed examples" * (mixture.batching == "packed")
    steps = f"{num_steps:,} optimizer step" + "s" * (num_steps != 1)
    if epochs is None:
        return f"{steps}, as training.max_steps says = {num_steps * batch / rows:.2f} epochs x {of} / {divisor}"
    total = mixture.rows_of_epochs(epochs)
    together = "" if epochs * rows == total else f" (together {total:,})"
    return f"{steps} = {epochs:g} epoch{'s' * (epochs != 1)} x {of}{together} / {divisor}" + ", rounded up" * bool(
        total % batch
    )
