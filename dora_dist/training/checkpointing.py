"""Checkpoints of a run: what is written and read, in which order, and what all ranks do together.

:mod:`dora_dist.runs.checkpoint` says what makes a checkpoint complete; this file fills it and reads it back.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from accelerate.utils.random import set_seed
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_pt_utils import safe_globals

from dora_dist.adapter.unfolded import load_parameters, trained_parameters
from dora_dist.config.format_version import METHOD_TENSORS
from dora_dist.console.text import say
from dora_dist.runs import checkpoint
from dora_dist.runs.adapter_folder.writing import complete_adapter
from dora_dist.training import method_state
from dora_dist.training.optimizer_shards import OptimizerShards, WholeState, is_sharded, load_whole
from dora_dist.training.parts import LoopSettings, TrainingParts

NAMES = "names"
"""Beside what torch saves of an optimizer: its parameters' names, in their order."""
OWN_DEVICE = "own_device"
"""Beside what the Trainer saves of a rank's random states: that of its own device."""


def keep_device_state(path: Path, device: torch.device) -> None:
    """Add the random state of a rank's own device to its file of random states, of any device but the CPU.

    The Trainer has those of all devices of the node there, by their place: the rank may have another place when the run
    goes on, as on one node with eight GPUs after two with four. They are taken out.

    Args:
        path: File of the rank, as the Trainer wrote it.
        device: the rank's device.
    """
    if device.type == "cpu":
        return
    with safe_globals():
        states = torch.load(path, weights_only=True)
    if isinstance(states.get(device.type), list):
        states[device.type] = []
    torch.save({**states, OWN_DEVICE: torch.get_device_module(device).get_rng_state(device)}, path)


def restore_device_state(path: Path, device: torch.device) -> None:
    """Let a rank's own device go on with the random state that :func:`keep_device_state` has kept, if there is one. In
    checkpoints of earlier versions there is none.

    Args:
        path: File of the rank.
        device: the rank's device now.
    """
    if device.type == "cpu":
        return
    with safe_globals():
        state = torch.load(path, weights_only=True).get(OWN_DEVICE)
    if state is not None:
        torch.get_device_module(device).set_rng_state(state, device)


class Checkpointer:
    """Saves and restores a run whose model and optimizer the engine has prepared.

    Args:
        parts: The parts of the loop.
        settings: The settings of the loop.
        optimizer: The prepared optimizer.
        scheduler: The schedule of its learning rate.
        shards: The state of a ZeRO optimizer, of which every rank holds a part; None under the other engines, where
            every rank holds all of it.
        trained: The trained parameters by name.
    """

    def __init__(
        self,
        parts: TrainingParts,
        settings: LoopSettings,
        optimizer: torch.optim.Optimizer,
        scheduler: LRScheduler,
        shards: OptimizerShards | None,
        trained: Mapping[str, nn.Parameter],
    ) -> None:
        self._controller = parts.controller
        self._agreement = parts.agreement
        self._records = parts.records
        self._best = parts.best
        self._settings = settings
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._shards = shards
        self._names = {parameter: name for name, parameter in trained.items()}
        self._optimizer_checked = False
        self._restored_from: Path | None = None
        self._written_by: int | None = None

    def check_optimizer_once(self) -> None:
        """Refuse an optimizer whose state cannot be saved, after the first step that was taken: the first save, which
        would find it too, comes much later.

        Raises:
            ValueError: Names the state; on all ranks.
        """
        if self._shards is not None and not self._optimizer_checked:
            self._optimizer_checked = True
            with self._agreement.together("looking at the optimizer's state"):
                self._shards.check()

    def save(self, step: int, write_trainer_files: Callable[[], None]) -> None:
        """Write ``checkpoint-STEP`` and seal it when all ranks have written theirs; to be called on every rank.

        Args:
            step: Optimizer steps taken so far.
            write_trainer_files: Writes the Trainer's own parts into the folder: the adapter folded for PEFT, the
                random states of this rank, and the Trainer's state.

        Raises:
            DisagreementError: The ranks hold different adapters.
            NonFiniteAdapterError: The adapter holds NaN or infinite values.
            RankFailedError: A rank could not write its part. The checkpoint is then not complete.
        """
        run = self._records.folder
        folder = run / f"checkpoint-{step}"
        self._controller.verify(f"the adapter before the checkpoint of step {step}")
        with self._agreement.together(f"preparing {folder}"):
            self._controller.check_finite()
            if self._agreement.is_first and folder.exists():
                shutil.rmtree(folder)  # what an interrupted save left
        with self._agreement.together(f"writing {folder}"), checkpoint.room_needed(folder):
            write_trainer_files()
            keep_device_state(self._random_states(folder), self._agreement.device)
            if self._agreement.is_first:
                self._describe(folder)
            self._write_optimizer(folder)
            if self._agreement.is_first:
                torch.save(self._scheduler.state_dict(), folder / SCHEDULER_NAME)
                best = None if self._best is None else self._best.state()
                method_state.save_method_state(
                    folder, self._controller, self._settings.fingerprint, self._agreement.size, best
                )
            self._records.save_events(folder)
            mine = checkpoint.files_of_rank(folder, self._agreement.rank, self._agreement.size)
            on_disk = checkpoint.bring_to_disk(folder, mine)
        by_rank = self._agreement.gather(on_disk)
        with self._agreement.together(f"sealing {folder}"), checkpoint.room_needed(folder):
            if self._agreement.is_first:
                checkpoint.check_shards(folder, self._agreement.size, self._settings.engine)
                checkpoint.seal(folder, {name: seen for files in by_rank for name, seen in files.items()})
                checkpoint.rotate(folder, self._settings.keep_last)

    def restore(self, folder: Path) -> None:
        """Take over from a checkpoint, which any number of ranks may have written; to be called on every rank, once.

        By then the Trainer has read its own state, from which it knows which rows to skip. The random states come later
        (:meth:`restore_random_states`).

        Args:
            folder: Folder of the checkpoint.

        Raises:
            ValueError: A file of the checkpoint does not fit this run; on all ranks.
            RankFailedError: A rank could not read the checkpoint; on all ranks.
            DisagreementError: The ranks read different states.
        """
        with self._agreement.together(f"loading {folder}"), checkpoint.plain_values_only(folder):
            state = checkpoint.read_method_state(folder)
            tensors = load_file(folder / METHOD_TENSORS)
            load_parameters(tensors, self._controller.layers, self._controller.head)
            self._read_optimizer(folder, state["step"], tensors)
            self._scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
            for group, rate in zip(self._optimizer.param_groups, self._scheduler.get_last_lr(), strict=True):
                group["lr"] = rate
        self._controller.load_state_dict(tensors, state["step"])
        with self._agreement.together(f"cutting the records back to step {state['step']}"):
            self._records.resume_from(folder, state["step"])
        if self._best is not None:
            self._best.load_state(state.get("best"))
        self._restored_from, self._written_by = folder, state["processes"]

    def load_best(self) -> None:
        """Take the adapter, and the head, of the best checkpoint of this run, which is not its last step; to be called
        on every rank when nothing is trained any more.

        Raises:
            ValueError: The checkpoint is not there, or damaged; on all ranks.
            DisagreementError: The ranks read different ones.
        """
        assert self._best is not None
        folder = self._records.folder / f"checkpoint-{self._best.step}"
        with self._agreement.together(f"loading {folder}, the best checkpoint"):
            if self._agreement.is_first and (flaw := checkpoint.flaw_of(folder)):
                raise ValueError(
                    f"{folder} is the best checkpoint by evaluation.keep_best ({self._best.rule.figure}), but cannot "
                    f"be used: {flaw}. Set evaluation.keep_best to null to end with the last adapter"
                )
            load_parameters(load_file(folder / METHOD_TENSORS), self._controller.layers, self._controller.head)
        self._controller.verify("the adapter of the best checkpoint")

    def restore_random_states(self, seed: int, load_trainer_states: Callable[[], None]) -> None:
        """Restore this rank's random states; on another number of ranks than wrote the checkpoint, seed new ones from
        seed, step and rank alone.

        This is the last part of a restore: an evaluation, and the data loader when it starts, draw from the same
        generators. To be called on every rank.

        Args:
            seed: Seed of the run.
            load_trainer_states: Loads the states that this rank has written.

        Raises:
            ValueError: The file holds other objects than tensors and numbers.
            RankFailedError: The state of a rank's device cannot be restored; on all ranks.
        """
        if self._written_by == self._agreement.size:
            assert self._restored_from is not None
            with checkpoint.plain_values_only(self._restored_from):
                load_trainer_states()
            with self._agreement.together(f"restoring the random states of {self._restored_from}"):
                restore_device_state(self._random_states(self._restored_from), self._agreement.device)
        else:
            fresh = np.random.SeedSequence([seed, self._controller.step]).generate_state(1)[0]
            set_seed(int(fresh) % 2**31, device_specific=True)

    def _random_states(self, folder: Path) -> Path:
        """The file of this rank in a checkpoint."""
        return folder / checkpoint.random_state_name(self._agreement.rank, self._agreement.size)

    def _describe(self, folder: Path) -> None:
        """What the records say about the run goes beside the adapter, into its card and for its use; a run does not end
        for want of it."""
        try:
            complete_adapter(folder, self._records.folder)
        except (OSError, ValueError) as error:
            say(f"the card of {folder} says nothing about the run, whose records cannot be read: {error}")

    def _write_optimizer(self, folder: Path) -> None:
        if self._shards is not None:
            self._shards.save(folder)
        elif self._agreement.is_first:
            names = [self._names[one] for group in self._optimizer.param_groups for one in group["params"]]
            torch.save({**self._optimizer.state_dict(), NAMES: names}, folder / OPTIMIZER_NAME)

    def _read_optimizer(self, folder: Path, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Whichever engine has written it."""
        if self._shards is None and is_sharded(folder):
            load_whole(folder, self._optimizer, self._names)
            return
        if self._shards is not None and is_sharded(folder):
            self._shards.load(folder, step)
            return
        state = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        if self._shards is None:
            self._optimizer.load_state_dict(state)
            return
        if NAMES not in state:
            raise ValueError(
                f"{folder} was written by an earlier version under another engine than zero2, and does not say whose "
                "its optimizer's states are: set distributed.engine to what wrote it"
            )
        states = {name: state["state"].get(number, {}) for number, name in enumerate(state[NAMES])}
        saved_as = trained_parameters(self._controller.layers, self._controller.head)
        whole = {self._names[one]: tensors[name] for name, one in saved_as.items() if one in self._names}
        self._shards.take_over(WholeState(states, whole), step)
