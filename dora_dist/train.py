"""The entry point: ``accelerate launch --config_file launch/X.yaml -m dora_dist.train --config configs/Y.yaml``.

:func:`main` reads in build order; every part is made in :mod:`dora_dist.build` and handed to the next.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dora_dist.command import run_command, say
from dora_dist.config import parse_config, save_config
from dora_dist.launch import check_launch
from dora_dist.quiet import quiet_libraries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from dora_dist.agreement import Agreement
    from dora_dist.model import DynamicLoraModel


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as configured and write adapter, records and pictures into ``output_dir``.

    Raises:
        ValueError: something that the user can mend.
        RuntimeError: the ranks failed or disagree, or the budget was missed.
    """
    quiet_libraries()
    config = parse_config(arguments)
    check_launch(config.distributed.engine, os.environ)
    # Heavy imports wait until the configuration has been found to be sound.
    from dora_dist import backbone, build, checkpoint, records, report, world
    from dora_dist.agreement import Agreement

    state = world.connect(config.distributed.engine, config.distributed.timeout_minutes)
    agreement = Agreement(state.device)
    run = Path(config.output_dir)
    if agreement.gather(report.is_finished(run))[0] and config.checkpoint.resume == "auto":
        return say(f"{run} holds a finished run; its adapter is {run / 'adapter'}")
    resume = choose_checkpoint(agreement, run, config.checkpoint.resume)

    backbone.check_model_path(config.model.path)
    tokenizer = backbone.load_tokenizer(config.model.path, config.model.trust_remote_code)
    train_data = build.load_data(config.data, tokenizer, config.data.train)
    eval_data = build.load_data(config.data, tokenizer, config.data.eval) if config.data.eval else None
    training = build.training_arguments(config, len(train_data.examples))
    fingerprint = build.fingerprint(config, training, len(train_data.examples))
    if resume is not None:
        checkpoint.check_fingerprint(resume, fingerprint)
    build.check_method(config, training.max_steps)

    model = build.load_model(config, state.device, tokenizer)
    controller = build.build_controller(config, model, agreement, training.max_steps)
    run_records = records.RunRecords(run, writes=state.is_main_process)
    evaluator = None
    if eval_data is not None:
        evaluator = build.build_evaluator(config, eval_data, tokenizer, agreement, training.per_device_eval_batch_size)
    trainer = build.build_trainer(
        config,
        model=model,
        controller=controller,
        agreement=agreement,
        records=run_records,
        tokenizer=tokenizer,
        train_data=train_data,
        evaluator=evaluator,
        arguments=training,
        run_fingerprint=fingerprint,
    )
    world.check_world(agreement, trainer)

    if state.is_main_process:
        save_config(config, run / records.CONFIG)
    run_records.write_json(records.RUN, {"versions": records.versions(), "settings": fingerprint})
    if resume is None:
        run_records.truncate_after(-1)
        if evaluator and config.evaluation.before:
            trainer.evaluate()
    trainer.train(resume_from_checkpoint=resume)
    controller.finish()
    if evaluator:
        trainer.evaluate()
    if state.is_main_process:
        save_adapter(model, tokenizer, run / "adapter")
        print(report.finish_run(run))
    agreement.close()


def save_adapter(model: "DynamicLoraModel", tokenizer: "PreTrainedTokenizerBase", folder: Path) -> None:
    """Write the adapter, folded to plain LoRA, with the tokenizer; ``folder`` is complete or not there."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def choose_checkpoint(agreement: "Agreement", run: Path, resume: str) -> Path | None:
    """Where to continue from, as the first rank sees it: files may reach the other nodes later."""
    from dora_dist import checkpoint

    found, failure = None, None
    if agreement.rank == 0:
        try:
            found, remarks = checkpoint.find_resumable(run, resume)
            for remark in remarks:
                say(remark)
        except ValueError as error:
            failure = str(error)
    (found, failure) = agreement.gather((found, failure))[0]
    if failure:
        raise ValueError(failure)
    if found:
        say(f"resuming from {found}")
    return found


if __name__ == "__main__":
    run_command(main)
