"""The objects and settings of the training loop, beside what transformers' Trainer takes."""

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
        controller: the pruning controller.
        agreement: collectives over the ranks.
        records: the records of the run, whose folder also holds its checkpoints.
        evaluator: evaluator of the model on held-out data; None without such data.
        notice: notice that is set when this rank has been told to stop.
        skip_policy: policy for steps whose loss or gradients are not finite.
        trackers: trackers that get the rank map at every event.
        best: search for the best checkpoint; None where the last one is taken.
        row_losses: function that computes the loss of every row, for a task with one target a row; None where the
            model's own loss is taken, over tokens.
        balance: function that returns the balancing loss of the latest forward, over all ranks, which call it together;
            None without routing.
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
        timeout_minutes: time that a rank waits for the others in a collective of the engine.
        data_start: how the adapter's start is computed from data; None where it is drawn at random.
        rank_choice: how the ranks are chosen from data; None where they are known.
        adapter_dtype: the dtype that the adapter's parameters must have when training begins.
        lora_plus_ratio: learning rate of the columns b_i, divided by that of everything else.
        equilibrium_weight: weight of the Dimensional Equilibrium Modulator in the loss.
        keep_last: number of complete checkpoints to keep.
        fingerprint: settings that a resumed run must not change.
        recomputation: layers that are recomputed in the backward.
        balance_weight: weight of the balancing loss, where there is one.
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
    """The sizes of the rows that are trained on, in the order of training.

    Attributes:
        lengths: number of tokens of every row, shape ``(rows,)``.
        per_epoch: number of rows that one pass over the data fills.
    """

    lengths: np.ndarray
    per_epoch: int
