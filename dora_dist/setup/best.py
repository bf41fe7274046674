"""By which evaluations the best checkpoint of a run is found."""

from transformers import DefaultFlowCallback, IntervalStrategy, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from dora_dist.config.checks import nearest
from dora_dist.config.run import RunConfig
from dora_dist.evaluation.best import BestRule, figures_of
from dora_dist.setup.run_data import RunData


def best_rule(config: RunConfig, arguments: TrainingArguments, data: RunData, final_event: int) -> BestRule | None:
    """The rule of ``evaluation.keep_best``; None where it is not set.

    Args:
        config: the run's configuration.
        arguments: the training arguments, with ``max_steps`` resolved.
        data: the run's data.
        final_event: step of the final event.

    Raises:
        ValueError: there is no such figure, or no checkpoint but the last one would be judged by it.
    """
    figure = config.evaluation.keep_best
    if figure is None:
        return None
    known = figures_of(config.measured, [source.name for source in data.evaluation])
    if figure not in known:
        raise ValueError(
            f"evaluation.keep_best is {figure!r}, but the evaluations of this run give {', '.join(known)}"
            f"{nearest(figure, known)}"
        )
    steps = _steps_evaluated_and_saved(arguments, final_event)
    if not steps:
        evaluates = IntervalStrategy(arguments.eval_strategy).value
        saves = SaveStrategy(arguments.save_strategy).value
        raise ValueError(
            f"evaluation.keep_best is {figure}, but no step is both evaluated and saved from step {final_event} on "
            f"(where no event is to come) and before the last one, {arguments.max_steps}: training.eval_strategy is "
            f"{evaluates}, eval_steps {arguments.eval_steps}, save_strategy {saves}, "
            f"save_steps {arguments.save_steps}. Set eval_strategy to steps, and eval_steps and save_steps to one "
            f"number, well below {arguments.max_steps - final_event}"
        )
    every = frozenset([*steps, arguments.max_steps])
    return BestRule(figure=figure, patience=config.evaluation.early_stopping, steps=every)


def _steps_evaluated_and_saved(arguments: TrainingArguments, first: int) -> list[int]:
    """Steps from ``first`` on, and before the last one, after which the Trainer evaluates and saves."""
    state, flow, found = TrainerState(max_steps=arguments.max_steps), DefaultFlowCallback(), []
    state.compute_steps(arguments, arguments.max_steps)
    for step in range(max(first, 1), arguments.max_steps):
        state.global_step = step
        control = flow.on_step_end(arguments, state, TrainerControl())
        if control.should_evaluate and control.should_save:
            found.append(step)
    return found
