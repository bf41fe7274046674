"""The entry point: ``accelerate launch --config_file launch/X.yaml -m dora_dist.train --config configs/Y.yaml``.

:func:`train` reads in build order; every part is made in :mod:`dora_dist.setup.build` and handed to the next.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.config.parse import parse_config, save_config
from dora_dist.console.command import attempt, run_command
from dora_dist.console.errors import PreemptedError
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.text import say
from dora_dist.distributed.launcher import check_launch
from dora_dist.distributed.preemption import PreemptionNotice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dora_dist.adapter.model import DynamicLoraModel
    from dora_dist.config.run import RunConfig
    from dora_dist.distributed.agreement import Agreement
    from dora_dist.distributed.heartbeat import HeartbeatMonitor
    from dora_dist.runs.resume import Earlier
    from dora_dist.setup.resolve import ResolvedRun

DRY_RUN = "--dry-run"


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as configured and write adapter, records and pictures into ``output_dir``.

    Raises:
        ValueError: something that the user can mend.
        ExpectedRunError: the ranks failed or disagree, the budget was missed, or the loss is not finite.
        PreemptedError: a rank was told to stop before the last step.
    """
    quiet_libraries()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    dry_run = DRY_RUN in arguments
    config = parse_config([argument for argument in arguments if argument != DRY_RUN])
    launched = "LOCAL_RANK" in os.environ or not dry_run  # a dry run needs no launcher
    if launched:
        check_launch(config.distributed.engine, os.environ)
    with PreemptionNotice() as notice:
        from dora_dist.distributed.heartbeat import HeartbeatMonitor
        from dora_dist.distributed.rendezvous import join_rendezvous

        rendezvous = (
            join_rendezvous(60 * config.distributed.join_minutes, "distributed.join_minutes") if launched else None
        )
        with HeartbeatMonitor(rendezvous, config.distributed.silent_seconds) as monitor:
            train(config, notice, monitor, launched, dry_run)


def train(
    config: "RunConfig", notice: PreemptionNotice, monitor: "HeartbeatMonitor", launched: bool, dry_run: bool
) -> None:
    """The run, or what it would be.

    Args:
        config: of the run.
        notice: of this rank's preemption.
        monitor: over all ranks.
        launched: whether the processes that the engine needs are there.
        dry_run: say what the run would be, and end.
    """
    from dora_dist.console import provenance
    from dora_dist.distributed import world
    from dora_dist.distributed.agreement import Agreement
    from dora_dist.runs import records, resume, summary
    from dora_dist.setup import build, resolve, run_data, tasks

    # Before the ranks join one process group: those that wait for the one that encodes wait for a file, not in a
    # collective.
    monitor.note("preparing data")
    read_data = attempt(lambda: run_data.read_data(config))
    monitor.note("joining the process group")
    state = world.connect(config.distributed.engine if launched else "none", config.distributed.timeout_minutes)
    agreement = Agreement(state.device, monitor)
    run = Path(config.output_dir)

    earlier = resume.Earlier(folder=run) if dry_run else look_into(run, config, agreement)
    with agreement.together("preparing data and settings"):
        resolved = resolve.resolve_run(config, *read_data(), resume.accumulation(earlier, config, agreement.size))
        resume.check_settings(earlier, resolved.fingerprint)
    for remark in resolved.data.remarks():
        say(remark)
    stop_before_training(notice, agreement)
    if dry_run:
        print_dry_run(config, resolved, agreement)
        return
    say(f"{config.data.batching} batches: {resolved.padding_share():.1%} of the computed tokens are padding")
    if earlier.finished:
        say(f"{run} holds a finished run with these settings; its adapter is {run / 'adapter'}")
        agreement.close()
        return
    for remark in resume.describe(earlier, config, agreement.size):
        say(remark)

    with agreement.together("loading the model"):
        model = build.load_model(config, state.device, resolved.tokenizer, resolved.data.labels)
        controller = build.build_controller(config, model, agreement, resolved.budget)
    stop_before_training(notice, agreement)
    build.check_same_on_all_ranks(agreement, resolved.fingerprint, model)
    run_records = records.RunRecords(run, writes=state.is_main_process)
    evaluator = tasks.build_evaluator(config, resolved, agreement, model)
    trainer = build.build_trainer(
        config,
        resolved,
        model=model,
        controller=controller,
        agreement=agreement,
        records=run_records,
        evaluator=evaluator,
        notice=notice,
    )
    world.check_world(agreement, trainer)

    with agreement.together(f"writing into {run}"):
        run_records.forget_end()
        described = {"settings": resolved.fingerprint, "data": resolved.describe_data(), "processes": agreement.size}
        run_records.write_json(records.RUN, {"versions": provenance.versions(), **described})
        if state.is_main_process:
            save_config(config, run / records.CONFIG)
        if earlier.checkpoint is None:
            run_records.truncate_after(-1)
    if earlier.checkpoint is None and evaluator and config.evaluation.before:
        trainer.evaluate()
    stop_before_training(notice, agreement)
    trainer.train(resume_from_checkpoint=earlier.checkpoint)
    if trainer.preempted:
        agreement.close()
        step = trainer.state.global_step
        raise PreemptedError(
            f"preempted at step {step}: checkpoint-{step} is complete; start the same command again to go on"
        )
    controller.finish()
    if evaluator and trainer.evaluated_step != resolved.arguments.max_steps:
        trainer.evaluate()
    with agreement.together(f"writing the results into {run}"):
        if state.is_main_process:
            save_adapter(model, resolved.tokenizer, run / "adapter")
            print(summary.finish_run(run), flush=True)
    agreement.close()


def stop_before_training(notice: PreemptionNotice, agreement: "Agreement") -> None:
    """End the run before its first step if any rank was told to stop: one decision of all.

    Raises:
        PreemptedError: one was.
    """
    if agreement.any(notice.received is not None):
        agreement.close()
        raise PreemptedError("preempted before training: nothing to save; start the same command again to go on")


def print_dry_run(config: "RunConfig", resolved: "ResolvedRun", agreement: "Agreement") -> None:
    """Say on the first rank what the run would do."""
    from dora_dist.setup import describe

    with agreement.together("estimating"):
        if agreement.rank == 0:
            print(describe.describe(config, resolved, agreement.size), flush=True)
    agreement.close()


def look_into(run: Path, config: "RunConfig", agreement: "Agreement") -> "Earlier":
    """What an earlier start has left in ``run``, as the first rank sees it.

    Raises:
        ValueError: what is there cannot be used.
    """
    from dora_dist.runs import resume

    earlier = None
    with agreement.together(f"looking into {run}"):
        if agreement.rank == 0:
            earlier = resume.look(run, config.checkpoint.resume)
    return agreement.gather(earlier)[0]


def save_adapter(model: "DynamicLoraModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the adapter, folded to plain LoRA, with the tokenizer; ``folder`` is complete or not there."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


if __name__ == "__main__":
    run_command(main)
