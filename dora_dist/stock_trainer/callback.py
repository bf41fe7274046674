"""A callback that prunes during training with transformers' Trainer or a subclass, such as TRL's.

It contains no method of its own: it builds the controller of :mod:`dora_dist.training.controller` and calls it from the
trainer's loop.
"""

import json
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from dora_dist.adapter.model import DynamicLoraModel
from dora_dist.adapter.unfolded import trained_parameters
from dora_dist.config.adapter import DynamicLoraConfig
from dora_dist.config.checks import require
from dora_dist.config.format_version import FORMAT_VERSION, METHOD_STATE, METHOD_TENSORS
from dora_dist.config.pruning import PruningConfig
from dora_dist.console.files import read_json, write_json
from dora_dist.console.text import say
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.world import check_world, host_group
from dora_dist.method.budget import Budget, component_costs
from dora_dist.method.prune_event import PruneEvent
from dora_dist.setup.build import build_controller
from dora_dist.setup.fingerprint import method_arguments
from dora_dist.setup.resolve import build_schedule
from dora_dist.stock_trainer import refusals
from dora_dist.stock_trainer.penalty_gradient import PenaltyGradient
from dora_dist.stock_trainer.rows import check_numbered, loss_of_row
from dora_dist.training.batch_size import global_batch
from dora_dist.training.controller import DynamicRankController
from dora_dist.training.from_data.start import DataStart, spread, start_from_data
from dora_dist.training.gradient_watch import GradientWatch
from dora_dist.training.method_state import save_method_tensors


class DynamicRankCallback(TrainerCallback):
    """Prunes the model of :func:`~dora_dist.add_dynamic_lora` while a ``transformers.Trainer`` trains it, in one
    process, under DDP or under ZeRO stage 2. Pass it to the trainer as ``callbacks=[...]``. One callback serves one
    training run.

    The trainer saves the folded adapter. The callback adds the files ``dynamic_lora.*`` to its checkpoints, from which
    ``train(resume_from_checkpoint=...)`` resumes.

    Args:
        pruning: settings as in the section ``pruning`` of a run; by default the paper's.
        init: ``inputs`` or ``gradient`` to start the adapter from data, as ``adapter.init`` of a run; the adapter
            itself is made with ``init="lora"``. None for no such start.
        calibration_rows: number of training rows for such a start, spread over the training data.

    Attributes:
        controller: the pruning controller, once training has begun.
        events: pruning events since training began or was resumed.

    Raises:
        ValueError: a value is out of range. When training begins, also: the trainer, its settings or the checkpoint to
            resume from does not fit; on all ranks.
        BudgetMissedError: training has ended before the last event; raised at its end, on all ranks.
        NonFiniteAdapterError: the adapter holds NaN or infinite values when a checkpoint is due or training ends.
    """

    def __init__(
        self,
        pruning: PruningConfig | None = None,
        *,
        init: Literal["inputs", "gradient"] | None = None,
        calibration_rows: int = 64,
    ) -> None:
        require(init in (None, "inputs", "gradient"), "init", repr(init), "be inputs, gradient or None")
        require(calibration_rows >= 1, "calibration_rows", calibration_rows, "be at least 1")
        self.pruning = pruning or PruningConfig()
        self.init = init
        self.calibration_rows = calibration_rows
        self.controller: DynamicRankController | None = None
        self.events: list[PruneEvent] = []
        self._settings: dict[str, Any] = {}
        self._penalty: PenaltyGradient | None = None
        self._watch: GradientWatch | None = None

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Restore the adapter's dtype. TRL 1.16 casts trained parameters on a quantized base to bfloat16, which loses
        small updates of a gate (``test_sft_trainer.py`` fails when this can go)."""
        model = refusals.check_model(kwargs["model"])
        refusals.check_pruning(self.pruning, model.dynamic_config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(model.adapter_dtype)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the controller, and start from data or resume from a checkpoint if requested."""
        if self.controller is not None:
            raise ValueError(
                "this DynamicRankCallback has pruned a model already: make a new model with add_dynamic_lora, a new "
                "callback and a new trainer, for a resume too"
            )
        model = refusals.check_model(kwargs["model"])
        refusals.check_pruning(self.pruning, model.dynamic_config)
        refusals.check_settings(args, state)
        refusals.check_dtype(model)
        agreement = Agreement(args.device, host_group=host_group(timedelta(seconds=args.ddp_timeout)))
        check_world(agreement, args, AcceleratorState())
        self._settings = _settings(self.pruning, model.dynamic_config, args, state)
        seed = model.dynamic_config.seed or 0
        begins = state.global_step == 0
        if self.init is not None and begins:
            _start(model, kwargs["train_dataloader"], self.init, self.calibration_rows, seed, agreement)
        budget = _budget(model, self.pruning, state.max_steps)
        self.controller = build_controller(self.pruning, seed, model, agreement, budget)
        if begins:
            self.controller.verify("the adapter at the start")
            self._watch = GradientWatch(self.controller.layers)
        else:
            self._resume(args, state)
        if self.pruning.equilibrium_weight:
            self._penalty = PenaltyGradient(self.controller, self.pruning.equilibrium_weight)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the penalty's gradient to this step."""
        if self._penalty is not None:
            self._penalty.begin_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Update the scores, and prune if an event is due."""
        controller = self._running
        if self._watch is not None:
            self._watch.check(controller.agreement)
            self._watch = None
        event = controller.after_optimizer_step(state.global_step)
        if event is not None:
            self.events.append(event)
            if event.final:
                of = controller.schedule.num_components
                say(f"step {event.step}: the last pruning event has kept {controller.num_kept} of {of} components")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Add the method's part to the checkpoint that the trainer has just written."""
        controller, folder = self._running, _checkpoint(args, state)
        controller.verify(f"the adapter in the checkpoint of step {state.global_step}")
        with controller.agreement.together(f"writing {folder}"):
            controller.check_finite()
            if args.should_save:
                save_method_tensors(folder, controller)
                about = {"format": FORMAT_VERSION, "step": controller.step, "settings": self._settings}
                write_json(folder / METHOD_STATE, about)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Verify that the budget is met."""
        if self._penalty is not None:
            self._penalty.end()
        with self._running.agreement.together("checking the adapter at the end of training"):
            self._running.check_finite()
        self._running.finish()

    @property
    def _running(self) -> DynamicRankController:
        assert self.controller is not None, "the trainer calls on_train_begin first"
        return self.controller

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        controller, folder = self._running, _checkpoint(args, state)
        with controller.agreement.together(f"loading {folder}"):
            tensors = self._read(folder, state.global_step)
        controller.load_state_dict(tensors, state.global_step)

    def _read(self, folder: Path, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint. The trainer has already loaded the checkpoint's parameters into the model.

        Raises:
            ValueError: the trainer has read another checkpoint, or this one lacks the method's part, or has other
                settings.
        """
        if not (folder / METHOD_STATE).is_file():
            raise ValueError(
                f"the trainer resumes from step {step}, but {folder / METHOD_STATE} is missing: resume "
                "from a checkpoint in output_dir that a trainer with a DynamicRankCallback has written to its end"
            )
        written = read_json(folder / METHOD_STATE)["settings"]
        for name, value in self._settings.items():
            # Checkpoints of earlier versions lack some.
            if written.get(name, value) != value:
                raise ValueError(
                    f"{name} is {value}, but {folder} was written with {written[name]}: settings that affect the "
                    "result must not change in a resume; set it back, or start a new run"
                )
        tensors = load_file(folder / METHOD_TENSORS)
        trained = trained_parameters(self._running.layers, self._running.head)
        for name, parameter in trained.items():
            if name not in tensors or not torch.equal(parameter.detach().cpu(), tensors[name]):
                raise ValueError(
                    f"{name} in the model is not what {folder} holds: the trainer has resumed from another folder, or "
                    "with another model. Resume from a checkpoint in output_dir, with the model that was trained"
                )
        return tensors


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder of the trainer's checkpoint at this step."""
    assert args.output_dir is not None
    return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def _settings(
    pruning: PruningConfig, adapter: DynamicLoraConfig, args: TrainingArguments, state: TrainerState
) -> dict[str, Any]:
    """Settings that must not change in a resume; plain JSON."""
    found = {
        "total steps": state.max_steps,
        "number of processes": args.world_size,
        "rows of a step on each process": global_batch(args, 1),
        **{f"pruning.{key}": value for key, value in asdict(pruning).items()},
        **{f"adapter.{key}": value for key, value in asdict(adapter).items()},
        **method_arguments(args),
    }
    plain: dict[str, Any] = json.loads(json.dumps(found))
    return plain


def _budget(model: DynamicLoraModel, pruning: PruningConfig, total_steps: int) -> Budget:
    layers = model.adapted_layers()
    shapes = {name: (layer.lora_a.shape[1], layer.lora_b.shape[0]) for name, layer in layers.items()}
    schedule = build_schedule(pruning, model.dynamic_config, len(layers), total_steps)
    return Budget(schedule, component_costs(shapes, pruning.budget_unit))


def _start(
    model: DynamicLoraModel, dataloader: DataLoader[Any], init: str, rows: int, seed: int, agreement: Agreement
) -> None:
    with agreement.together("checking the training data for a start from data"):
        numbers = spread(rows, check_numbered(dataloader))
    start_from_data(
        model, partial(loss_of_row, model, dataloader), DataStart(init=init, rows=numbers, seed=seed), agreement
    )
