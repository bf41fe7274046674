"""The entry point: ``accelerate launch --config_file launch/X.yaml -m dora_dist.train --config configs/Y.yaml``.

:func:`main` reads in build order; every part is made in :mod:`dora_dist.build` and handed to the next.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.command import attempt, run_command, say
from dora_dist.config import parse_config, save_config
from dora_dist.launch import check_launch
from dora_dist.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dora_dist.model import DynamicLoraModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as configured and write adapter, records and pictures into ``output_dir``.

    Raises:
        ValueError: something that the user can mend.
        ExpectedRunError: the ranks failed or disagree, the budget was missed, or the loss is not finite.
    """
    quiet_libraries()
    config = parse_config(arguments)
    check_launch(config.distributed.engine, os.environ)
    # Heavy imports wait until the configuration has been found to be sound.
    from dora_dist import build, build_data, checkpoint, records, report, world
    from dora_dist.agreement import Agreement

    # Before the ranks join: those that wait for the one that encodes wait for a file, not in a collective.
    read_data = attempt(lambda: build_data.read_data(config))
    state = world.connect(config.distributed.engine, config.distributed.timeout_minutes)
    agreement = Agreement(state.device)
    run = Path(config.output_dir)

    with agreement.together("preparing data and settings"):
        tokenizer, data = read_data()
        mixture = build_data.build_mixture(config.data, data.train, config.seed)
        training = build.training_arguments(config, mixture)
        plan = mixture.plan(training.max_steps, build.global_batch(training))
        settings = build.fingerprint(config, training, data, plan)
        described = build_data.describe_data(data, mixture, plan, training.per_device_train_batch_size)
        build.check_method(config, training.max_steps)
    with agreement.together(f"looking into {run}"):
        finished = agreement.rank == 0 and config.checkpoint.resume == "auto" and is_same_finished_run(run, settings)
        found, remarks = (
            (None, []) if agreement.rank or finished else checkpoint.find_resumable(run, config.checkpoint.resume)
        )
        if found is not None:
            checkpoint.check_fingerprint(found, settings)
    # As the first rank sees it: files may reach the other nodes later.
    finished, resume, remarks = agreement.gather((finished, found, remarks))[0]
    if finished:
        say(f"{run} holds a finished run with these settings; its adapter is {run / 'adapter'}")
        agreement.close()
        return
    for remark in [*remarks, *([f"resuming from {resume}"] if resume else [])]:
        say(remark)

    with agreement.together("loading the model"):
        model = build.load_model(config, state.device, tokenizer)
        controller = build.build_controller(config, model, agreement, training.max_steps)
    build.check_same_on_all_ranks(agreement, settings, model)
    run_records = records.RunRecords(run, writes=state.is_main_process)
    evaluator = None
    if data.evaluation:
        evaluator = build.build_evaluator(config, data, tokenizer, agreement, training.per_device_eval_batch_size)
    trainer = build.build_trainer(
        config,
        model=model,
        controller=controller,
        agreement=agreement,
        records=run_records,
        tokenizer=tokenizer,
        data=data,
        plan=plan,
        rows_per_epoch=mixture.rows_of_epochs(1),
        evaluator=evaluator,
        arguments=training,
        run_fingerprint=settings,
    )
    world.check_world(agreement, trainer)

    with agreement.together(f"writing into {run}"):
        run_records.forget_end()
        if state.is_main_process:
            save_config(config, run / records.CONFIG)
        run_records.write_json(records.RUN, {"versions": records.versions(), "settings": settings, "data": described})
        if resume is None:
            run_records.truncate_after(-1)
    if resume is None and evaluator and config.evaluation.before:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    controller.finish()
    if evaluator and trainer.evaluated_step != training.max_steps:
        trainer.evaluate()
    with agreement.together(f"writing the results into {run}"):
        if state.is_main_process:
            save_adapter(model, tokenizer, run / "adapter")
            print(report.finish_run(run), flush=True)
    agreement.close()


def is_same_finished_run(run: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``run`` has come to its end with these settings.

    Raises:
        ValueError: it has come to its end with other ones.
    """
    from dora_dist import checkpoint, records, report

    if not report.is_finished(run):
        return False
    checkpoint.check_same_settings(run, records.read_json(run / records.RUN)["settings"], settings)
    return True


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
