"""What the training loop is made of, beside what transformers' Trainer takes."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dora_dist.base_model.losses import RowLosses
from dora_dist.base_model.recomputation import Recomputation
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.evaluation.best import BestCheckpoint
from dora_dist.evaluation.evaluator import Evaluator
from dora_dist.runs.fingerprint import Fingerprint
from dora_dist.runs.records import RunRecords
from dora_dist.runs.trackers import Trackers
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.from_data.ranks import RankChoice
from dora_dist.training.from_data.start import DataStart
from dora_dist.training.skipped_steps import SkipPolicy


@dataclass(frozen=True, kw_only=True)
class TrainingParts:
    """The objects that the loop works with.

    Attributes:
        controller: The method.
        agreement: Collectives over the ranks.
        records: The records of the run, whose folder also holds its checkpoints.
        evaluator: Measures the model on held-out data; None without any.
        notice: Set when this rank has been told to stop.
        skip_policy: Decides about steps whose loss or gradients are not finite.
        trackers: Get the rank map at every event.
        best: Finds the best checkpoint; None where the last one is taken.
        row_losses: Loss of every row, for a task with one target a row; None where the model's own loss is taken,
            over tokens.
        balance: The balancing loss of the latest forward, over all ranks, which call it together; None without routing.
    """

    controller: DynamicRankController
    agreement: Agreement
    records: RunRecords
    evaluator: Evaluator | None
    notice: PreemptionNotice
    skip_policy: SkipPolicy
    trackers: Trackers
    best: BestCheckpoint | None = None
    row_losses: RowLosses | None = None
    balance: Callable[[], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """Settings of the training loop.

    Attributes:
        engine: ``distributed.engine`` of the configuration.
        timeout_minutes: How long a rank waits for the others in a collective of the engine.
        data_start: How the adapter starts from data; None where it is drawn.
        rank_choice: How the ranks are made from data; None where they are known.
        adapter_dtype: The dtype that the adapter's parameters must have when training begins.
        lora_plus_ratio: Learning rate of the columns b_i over that of all else.
        equilibrium_weight: Weight of the Dimensional Equilibrium Modulator in the loss.
        keep_last: Number of complete checkpoints to keep.
        fingerprint: Settings that a resumed run must not change.
        recomputation: Layers that are computed again in the backward.
        balance_weight: Weight of the balancing loss, where there is one.
    """

    engine: str
    timeout_minutes: float
    data_start: DataStart | None
    rank_choice: RankChoice | None
    adapter_dtype: torch.dtype
    lora_plus_ratio: float
    equilibrium_weight: float
    keep_last: int
    fingerprint: Fingerprint
    recomputation: Recomputation
    balance_weight: float = 0.0


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingRows:
    """The size of the rows that are trained on, in the order of training.

    Attributes:
        lengths: Tokens of every row, shape ``(rows,)``.
        per_epoch: Number of rows that one pass over the data fills.
    """

    lengths: np.ndarray
    per_epoch: int
