"""The entry point: ``accelerate launch --config_file launch/X.yaml -m dora_dist.train --config configs/Y.yaml``.

:func:`train` has the order of what comes before a run: read the data, join the ranks, claim the folder.
:func:`train_claimed` has that of the run itself: decide, build, record, train, finish.
"""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.config.command_line import with_config_option
from dora_dist.config.parse import parse_config
from dora_dist.console.arguments import SPEED_OPTION, add_speed_option, speed_of
from dora_dist.console.command import capture, do_last, run_command
from dora_dist.console.errors import PreemptedError, mark_common
from dora_dist.console.library_warnings import quiet_libraries
from dora_dist.console.phases import Phases
from dora_dist.console.text import say
from dora_dist.distributed.launcher import check_launch, check_precision, check_whole, check_world_size, launched
from dora_dist.distributed.preemption import PreemptionNotice

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dora_dist.config.run import RunConfig
    from dora_dist.console.command import Captured
    from dora_dist.distributed.agreement import Agreement
    from dora_dist.distributed.heartbeat import HeartbeatMonitor
    from dora_dist.runs.resume import Earlier
    from dora_dist.runs.trackers import Trackers
    from dora_dist.setup.failure import FailureRecorder
    from dora_dist.setup.resolve import ResolvedRun
    from dora_dist.setup.run_data import RunData
    from dora_dist.training.trainer import DynamicLoraTrainer

DRY_RUN = "--dry-run"


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` asks for.

    Attributes:
        world_size: number of ranks to reckon with (``--world-size``); None for those of this launch, or for those
            that this machine would start.
        tokens_per_second: speed of all these ranks (``--tokens-per-second``); None for what the run's folder shows.
    """

    world_size: int | None = None
    tokens_per_second: float | None = None


def start(arguments: Sequence[str]) -> None:
    """``dora-dist train``: be a rank where a launcher has started this process; start the ranks otherwise.

    Raises:
        ValueError: The configuration or the input is invalid.
        SystemExit: a rank that was started here has failed or was preempted; with its exit status.
    """
    parser = argparse.ArgumentParser(
        prog="dora-dist train", usage="%(prog)s CONFIG [--processes N] ...", add_help=False, allow_abbrev=False
    )
    parser.add_argument("--processes", type=int)
    options, rest = parser.parse_known_args(arguments)
    quiet_libraries()
    given = with_config_option(rest)
    # Not SLURM_PROCID: a batch script has it too, and is no rank.
    is_rank = launched(os.environ)
    if is_rank or DRY_RUN in given or {"-h", "--help"} & set(given):
        if options.processes is not None:
            why = "is a rank, which a launcher has started" if is_rank else "starts no ranks"
            raise ValueError(f"--processes is {options.processes}, but this process {why}: leave it out")
        main(given)
        return
    check_whole(os.environ)
    given, _ = split_dry_run(given)
    config = parse_config(given)  # what is wrong with it is said before any rank is there
    from dora_dist.data.reading.files import locate

    for source in (*config.data.train_sources, *config.data.eval_sources):
        locate(source.path)  # of whatever is missing here, the ranks would say so much later
    engine = config.distributed.engine
    if engine == "none" and options.processes in (None, 1):
        main(given)
        return
    from dora_dist.distributed.start_ranks import number_of_ranks, start_ranks

    world_size, gpus = number_of_ranks(engine, options.processes)
    say(f"starting {world_size} {'process' if world_size == 1 else 'processes'} on {'GPUs' if gpus else 'CPUs'}")
    status = start_ranks(engine, world_size, gpus, "dora_dist.train", given)
    if status:
        raise SystemExit(status)


def main(arguments: Sequence[str] | None = None) -> None:
    """One rank: train as configured and write adapter, records and pictures into ``output_dir``.

    Raises:
        ValueError: The configuration or the input is invalid.
        ExpectedRunError: the ranks failed or disagree, the budget was missed, or the loss is not finite.
        PreemptedError: a rank was told to stop before the last step.
    """
    quiet_libraries()
    try:
        arguments, dry_run = split_dry_run(with_config_option(arguments))
        has_ranks = launched(os.environ) or dry_run is None  # a dry run needs no launcher
        config = parse_config(arguments)
        if dry_run is not None and dry_run.world_size is not None:
            check_world_size(dry_run.world_size, config.distributed.engine)
        if has_ranks:
            check_launch(config.distributed.engine, os.environ)
            from dora_dist.base_model.load import resolve_compute_dtype

            dtype = resolve_compute_dtype(config.model.compute_dtype)
            check_precision(str(dtype).removeprefix("torch."), os.environ)
        from dora_dist.runs.resume import refuse_foreign_folder

        refuse_foreign_folder(Path(config.output_dir))
    except ValueError as error:
        raise mark_common(error) from None  # the ranks of a node have the same command line and launcher
    with PreemptionNotice() as notice, Phases("starting") as phases:
        from dora_dist.distributed.heartbeat import HeartbeatMonitor
        from dora_dist.distributed.rendezvous import join_rendezvous

        phases.phase = "waiting for all ranks to start"
        rendezvous = (
            join_rendezvous(60 * config.distributed.join_minutes, "distributed.join_minutes") if has_ranks else None
        )
        with HeartbeatMonitor(rendezvous, config.distributed.silent_seconds, phases) as monitor:
            from dora_dist.setup.failure import FailureRecorder

            failures = FailureRecorder(Path(config.output_dir))
            do_last(failures.record)
            train(config, notice, monitor, has_ranks, dry_run, failures)


def split_dry_run(arguments: Sequence[str]) -> tuple[list[str], DryRun | None]:
    """The arguments that are the configuration's, and the dry run that the others ask for.

    Raises:
        ValueError: an option of a dry run is given for a run, or is no number.
    """
    parser = argparse.ArgumentParser(prog="dora-dist train", add_help=False, allow_abbrev=False)
    parser.add_argument(DRY_RUN, action="store_true")
    parser.add_argument("--world-size", type=int)
    add_speed_option(parser)
    options, rest = parser.parse_known_args(arguments)
    speed = speed_of(options)
    if options.dry_run:
        return rest, DryRun(options.world_size, speed)
    if speed is not None:
        raise ValueError(
            f"{SPEED_OPTION} is {speed:g}, but it is for {DRY_RUN}, which estimates the time of a "
            "run by it: leave it out"
        )
    if options.world_size is not None:
        raise ValueError(
            f"--world-size is {options.world_size}, but it is for {DRY_RUN}: a run has as many ranks as are started "
            "(--processes N, or the launcher's option)"
        )
    return rest, None


def train(
    config: "RunConfig",
    notice: PreemptionNotice,
    monitor: "HeartbeatMonitor",
    has_ranks: bool,
    dry_run: DryRun | None,
    failures: "FailureRecorder | None" = None,
) -> None:
    """Run the training, or with ``dry_run`` print what it would do.

    Args:
        config: the run's configuration.
        notice: whether this rank was told to stop.
        monitor: heartbeats of all ranks.
        has_ranks: whether the processes that the engine needs are there.
        dry_run: print what the run would be, and end; None to train.
        failures: learns when the run begins to write into its folder; None where the caller records failures itself.
    """
    from dora_dist.distributed import world
    from dora_dist.runs import claim
    from dora_dist.setup import run_data

    run = Path(config.output_dir)
    # Before the ranks join one process group: those that wait for the one that encodes wait for a file, not in a
    # collective.
    monitor.note("preparing data")
    data = capture(run_data.read_data, config)
    monitor.note("joining the process group")
    engine = config.distributed.engine if has_ranks else "none"
    with world.joined(engine, config.distributed.timeout_minutes, monitor) as agreement:
        if dry_run is not None:
            world_size = agreement.size if has_ranks else world_size_of_a_run(config)
            print_dry_run(config, data, agreement, dry_run, dry_run.world_size or world_size)
            return
        with claim.held(run, agreement):
            train_claimed(config, data, agreement, notice, failures)


def train_claimed(
    config: "RunConfig",
    data: "Captured[tuple[PreTrainedTokenizerBase, RunData]]",
    agreement: "Agreement",
    notice: PreemptionNotice,
    failures: "FailureRecorder | None",
) -> None:
    """The run whose folder is claimed, from what an earlier start has left there to its end.

    Raises:
        PreemptedError: a rank was told to stop before the last step.
    """
    from dora_dist.runs import resume
    from dora_dist.setup import build
    from dora_dist.setup.adapter_use import describe_adapter

    run = Path(config.output_dir)
    earlier = agreement.of_first(f"looking into {run}", lambda: resume.look(run, config.checkpoint.resume))
    resolved = decide(config, data, earlier, agreement, agreement.size)
    stop_before_training(notice, agreement)
    if earlier.finished:
        say(f"{run} holds a finished run with these settings; {describe_adapter(run / 'adapter', config)}")
        return
    from dora_dist.setup.describe import banner

    say(banner(config, resolved, agreement.size))
    say(f"{config.data.batching} batches: {resolved.padding_share():.1%} of the computed tokens are padding")
    if resolved.unadapted:
        say(resolved.unadapted)
    for remark in resume.describe(earlier, config, agreement.size):
        say(remark)
    with build.start_trackers(config, resolved, earlier, agreement) as trackers:
        trainer = build_parts(config, resolved, agreement, notice, trackers)
        resolved = replace(resolved, start_adapter=None)  # its components are in the model, and need no room beside it
        if failures is not None:
            failures.run_has_begun(lambda: trainer.begun_step)
        record_start(config, resolved, earlier, trainer)
        stop_before_training(notice, agreement)
        trainer.train(resume_from_checkpoint=earlier.checkpoint)
        if trainer.preempted:
            step = trainer.state.global_step
            raise PreemptedError(
                f"preempted at step {step}: checkpoint-{step} is complete; start the same command again to resume"
            )
        finish(run, config, resolved, trainer)


def decide(
    config: "RunConfig",
    data: "Captured[tuple[PreTrainedTokenizerBase, RunData]]",
    earlier: "Earlier",
    agreement: "Agreement",
    world_size: int,
) -> "ResolvedRun":
    """All of the run that is decided before a weight is read, the same on every rank.

    Raises:
        ValueError: the configuration, the data, or what an earlier start has left cannot be used.
    """
    from dora_dist.runs import resume
    from dora_dist.setup.recomputation import smallest_card
    from dora_dist.setup.resolve import resolve_run

    card = smallest_card(agreement)
    with agreement.together("preparing data and settings"):
        accumulation = resume.accumulation(earlier, config, world_size)
        resolved = resolve_run(config, *data.result(), accumulation, world_size, card, earlier.started_from)
        resume.check_settings(earlier, resolved.fingerprint)
        resume.check_best(earlier, config)
    for remark in resolved.remarks():
        say(remark)
    return resolved


def build_parts(
    config: "RunConfig",
    resolved: "ResolvedRun",
    agreement: "Agreement",
    notice: PreemptionNotice,
    trackers: "Trackers",
) -> "DynamicLoraTrainer":
    """Model, controller, records, evaluator, and the trainer that has them all.

    Raises:
        PreemptedError: a rank was told to stop while the model was loaded.
        ExpectedRunError: a rank could not load the model, or the ranks hold different ones.
    """
    from dora_dist.distributed.out_of_memory import explained
    from dora_dist.distributed.world import check_world
    from dora_dist.runs.records import RunRecords
    from dora_dist.setup import build
    from dora_dist.setup.fingerprint import adapter_seed
    from dora_dist.setup.recomputation import apply_recomputation
    from dora_dist.setup.tasks import TASK_PARTS
    from dora_dist.training.out_of_memory import LOADING_ADVICE

    shards = agreement.sharded_base = build.shards_of_base(config, agreement)
    if shards is not None:
        bases = agreement.size // shards.ranks
        copies = f"; the ranks hold {bases} copies of it" if bases > 1 else ""
        say(f"the base is in {shards.ranks} shards, one a rank{copies}")
    with agreement.together("loading the model"), explained(lambda: LOADING_ADVICE):
        device, tokenizer, data = agreement.device, resolved.tokenizer, resolved.data
        model = build.load_model(config, device, tokenizer, data.labels, shards, resolved.start_adapter, data)
        apply_recomputation(config, model.get_base_model(), resolved.recomputation)
        seed = adapter_seed(config)
        controller = build.build_controller(config.pruning, seed, model, agreement, resolved.budget)
    with agreement.together("trying the loss without logits", runs_model=True), explained(lambda: LOADING_ADVICE):
        build.try_loss_without_logits(model)
    stop_before_training(notice, agreement)
    build.check_same_on_all_ranks(agreement, resolved.fingerprint, resolved.recomputation, model)
    task = TASK_PARTS[config.task]
    trainer = build.build_trainer(
        config,
        resolved,
        model=model,
        controller=controller,
        agreement=agreement,
        records=RunRecords(Path(config.output_dir), writes=agreement.is_first),
        evaluator=task.evaluator(config, resolved, agreement, model) if resolved.data.evaluation else None,
        notice=notice,
        trackers=trackers,
    )
    check_world(agreement, trainer.args, trainer.accelerator)
    return trainer


def record_start(
    config: "RunConfig", resolved: "ResolvedRun", earlier: "Earlier", trainer: "DynamicLoraTrainer"
) -> None:
    """Write what the run is, and what its model can do before the first step, where that is asked for."""
    agreement, records = trainer.parts.agreement, trainer.parts.records
    begins = earlier.checkpoint is None
    with agreement.together(f"writing into {config.output_dir}"):
        records.forget_end()
        records.describe_run(config, resolved.fingerprint, resolved.describe_data(), agreement.size, resolved.unadapted)
        trainer.parts.trackers.record(records.folder)
        if begins:
            records.truncate_after(-1)
    if begins and trainer.parts.evaluator and config.evaluation.before:
        trainer.evaluate()


def finish(run: Path, config: "RunConfig", resolved: "ResolvedRun", trainer: "DynamicLoraTrainer") -> None:
    """Check what the method promised, measure once more, and write adapter, summary and pictures.

    Raises:
        BudgetMissedError: the kept components are not the budget.
        ValueError: every gate is 0.
    """
    from dora_dist.adapter.ranks import write_plan
    from dora_dist.base_model.load import BaseModelSpec, scaled_positions
    from dora_dist.page.document import keep_current
    from dora_dist.runs import records, summary
    from dora_dist.runs.adapter_folder.writing import write_adapter
    from dora_dist.setup.adapter_use import describe_size, describe_use

    parts = trainer.parts
    parts.controller.finish()
    if parts.evaluator and trainer.evaluated_step != trainer.state.global_step:
        trainer.evaluate()
    trainer.take_best()
    with parts.agreement.together(f"writing the results into {run}"):
        if parts.agreement.is_first:
            trainer.model.check_alive()
            needed = write_adapter(run / "adapter", run, resolved.tokenizer, trainer.model.save_pretrained)
            write_plan(run / records.PLAN, parts.controller.plan, resolved.fingerprint.as_dict())
            task, labels = resolved.fingerprint.task, resolved.fingerprint.labels
            text = summary.finish_run(run)
            keep_current(run)
            page = [f"  {'page':<16} {run / records.PAGE}"] if (run / records.PAGE).is_file() else []
            spec = BaseModelSpec.of(config.model, config.task)
            use = describe_use(run, task, labels, scaled_positions(spec), needed)
            print(text, *page, describe_size(run, task), "", use, sep="\n", flush=True)


def stop_before_training(notice: PreemptionNotice, agreement: "Agreement") -> None:
    """End the run before its first step if any rank has received a signal: one decision of all ranks.

    Raises:
        PreemptedError: A rank has received a signal.
    """
    if agreement.any(notice.received is not None):
        raise PreemptedError("preempted before training: nothing to save; start the same command again to resume")


def world_size_of_a_run(config: "RunConfig") -> int:
    """How many ranks ``dora-dist train`` would start on this machine."""
    from dora_dist.distributed.start_ranks import number_of_ranks

    engine = config.distributed.engine
    return 1 if engine == "none" else number_of_ranks(engine, None)[0]


def print_dry_run(
    config: "RunConfig",
    data: "Captured[tuple[PreTrainedTokenizerBase, RunData]]",
    agreement: "Agreement",
    dry_run: DryRun,
    world_size: int,
) -> None:
    """Print on the first rank what the run would do on that many ranks."""
    from dora_dist.runs import resume
    from dora_dist.runs.speed import find_speed
    from dora_dist.setup.describe import describe

    run = Path(config.output_dir)
    resolved = decide(config, data, resume.Earlier(folder=run), agreement, world_size)
    with agreement.together("estimating"):
        if agreement.is_first:
            print(describe(config, resolved, world_size, find_speed(run, dry_run.tokens_per_second)), flush=True)


if __name__ == "__main__":
    run_command(main)
