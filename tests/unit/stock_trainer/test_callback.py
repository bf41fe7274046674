"""The callback in transformers' own Trainer, in one process."""

import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from support.stock_trainer import INITIAL, PRUNING, TARGET, adapted, make_trainer, rows, state_of
from support.tiny_models import load_base, logits, tiny_model
from support.tiny_run import save_tiny_model
from transformers import TrainerCallback, TrainingArguments

from dora_dist import DynamicRankCallback, PruningConfig
from dora_dist.console.files import read_json, write_json
from dora_dist.stock_trainer import refusals
from dora_dist.training.controller import BudgetMissedError, NonFiniteAdapterError

SAVING = {"save_strategy": "steps", "save_steps": 1}


def new_callback(**changes):
    return DynamicRankCallback(PruningConfig(**{**PRUNING, **changes}))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def finished(base, tmp_path_factory):
    """A training that was left alone, with a checkpoint after every step."""
    output = tmp_path_factory.mktemp("trained")
    model, callback = adapted(base, "nf4"), new_callback(importance="gate_sensitivity")
    trainer = make_trainer(model, callback, output, **SAVING)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter was never pruned")
        trainer.train()
        trainer.save_model(output / "adapter")
    return SimpleNamespace(model=model, callback=callback, output=output)


def test_the_budget_is_met_and_stock_peft_computes_the_same(finished, base):
    layers = finished.model.adapted_layers()
    assert [event.step for event in finished.callback.events] == [1, 2, 3, 4]
    assert sum(finished.callback.controller.ranks.values()) == TARGET * len(layers) < INITIAL * len(layers)
    plain = PeftModel.from_pretrained(load_base(base), finished.output / "adapter")
    assert type(plain).__name__ == "PeftModelForCausalLM"
    torch.testing.assert_close(logits(plain.eval()), logits(finished.model.eval()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_training_ends_at_the_same_bits(finished, base, step):
    model, callback = adapted(base, "nf4"), new_callback(importance="gate_sensitivity")
    trainer = make_trainer(model, callback, finished.output, **SAVING)
    trainer.train(resume_from_checkpoint=str(finished.output / f"checkpoint-{step}"))
    assert [event.step for event in callback.events] == [3, 4][: 4 - step]
    left_alone, resumed = state_of(finished.model), state_of(model)
    assert left_alone.keys() == resumed.keys()
    assert all(resumed[name].equal(value) for name, value in left_alone.items())


def test_a_resume_that_would_go_another_way_is_refused(finished, base, tmp_path):
    def resume(output=finished.output, **changes):
        pruning = {"importance": "gate_sensitivity", **changes}
        trainer = make_trainer(adapted(base), new_callback(**pruning), output)
        trainer.train(resume_from_checkpoint=str(finished.output / "checkpoint-2"))

    with pytest.raises(ValueError, match=r"pruning\.min_rank is 1, but .*checkpoint-2 was written with 0"):
        resume(min_rank=1)
    with pytest.raises(ValueError, match=r"resumes from step 2, but .*dynamic_lora\.json is missing"):
        resume(output=tmp_path)
    other = tmp_path / "checkpoint-2"
    other.mkdir()
    third = finished.output / "checkpoint-3"
    write_json(other / "dynamic_lora.json", read_json(third / "dynamic_lora.json"))
    (other / "dynamic_lora.safetensors").write_bytes((third / "dynamic_lora.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"in the model is not what .*checkpoint-2 holds"):
        resume(output=tmp_path)


@pytest.mark.parametrize(
    ("adapter", "arguments", "message"),
    [
        ({"alpha": 64.0}, {}, r"adapter\.alpha is 64\.0, but .* was written with 8\.0"),
        ({"scale": "sqrt_rank"}, {}, r"adapter\.scale is sqrt_rank"),
        ({"target_rank": 3}, {}, r"adapter\.target_rank is 3"),
        ({}, {"learning_rate": 1e-3}, r"learning_rate is 0\.001"),
        ({}, {"optim": "sgd"}, r"optim is sgd, but .* was written with adamw_torch"),
        ({}, {"lr_scheduler_type": "cosine"}, r"lr_scheduler_type is cosine"),
        ({}, {"weight_decay": 0.5}, r"weight_decay is 0\.5"),
        ({}, {"max_grad_norm": 1.0}, r"max_grad_norm is 1\.0"),
        ({}, {"gradient_accumulation_steps": 2}, "rows of a step on each process is 4"),
    ],
)
def test_a_resume_with_another_adapter_or_other_steps_is_refused(adapter, arguments, message, finished, base):
    callback = new_callback(importance="gate_sensitivity")
    trainer = make_trainer(adapted(base, "nf4", **adapter), callback, finished.output, **arguments)
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(finished.output / "checkpoint-2"))


def test_a_resume_on_another_number_of_processes_is_refused(finished, base, tmp_path):
    written = tmp_path / "checkpoint-2"
    shutil.copytree(finished.output / "checkpoint-2", written)
    state = read_json(written / "dynamic_lora.json")
    state["settings"]["number of processes"] = 2
    write_json(written / "dynamic_lora.json", state)
    trainer = make_trainer(adapted(base, "nf4"), new_callback(importance="gate_sensitivity"), tmp_path)
    with pytest.raises(ValueError, match=r"number of processes is 1, but .* was written with 2"):
        trainer.train(resume_from_checkpoint=str(written))


def test_a_checkpoint_of_an_earlier_version_with_fewer_settings_goes_on(finished, base, tmp_path):
    written = tmp_path / "checkpoint-6"
    shutil.copytree(finished.output / "checkpoint-6", written)
    state = read_json(written / "dynamic_lora.json")
    state["settings"] = {
        name: value for name, value in state["settings"].items() if name == "total steps" or "pruning" in name
    }
    write_json(written / "dynamic_lora.json", state)
    model = adapted(base, "nf4")
    make_trainer(model, new_callback(importance="gate_sensitivity"), tmp_path).train(str(written))
    left_alone = state_of(finished.model)
    assert all(left_alone[name].equal(value) for name, value in state_of(model).items())


def test_what_a_folder_holds_that_is_no_checkpoint_of_this_adapter_is_not_loaded(finished, base):
    with pytest.raises(ValueError, match=r"adapter has no dynamic_lora\.safetensors"):
        adapted(base).load_adapter(finished.output / "adapter", "default")
    with pytest.raises(ValueError, match="is of another adapter"):
        adapted(base, initial_rank=INITIAL + 1).load_adapter(finished.output / "checkpoint-2", "default")


def test_a_callback_serves_one_training(finished):
    with pytest.raises(ValueError, match="has pruned a model already"):
        make_trainer(finished.model, finished.callback, finished.output).train()


def test_an_adapter_that_nothing_has_pruned_says_so_when_it_is_saved(base, tmp_path):
    make_trainer(model := adapted(base), None, tmp_path, max_steps=1).train()
    with pytest.warns(UserWarning, match=f"never pruned.*initial_rank {INITIAL}, and not target_rank {TARGET}"):
        model.save_pretrained(tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the adapter was never pruned")
        adapted(base, initial_rank=TARGET).save_pretrained(tmp_path / "kept")


def test_a_training_that_ends_before_the_last_event_is_an_error(base, tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == 2

    trainer = make_trainer(adapted(base), new_callback(), tmp_path)
    trainer.add_callback(Stop())
    with pytest.raises(BudgetMissedError, match="ended at step 2 before the final pruning event of step 4"):
        trainer.train()


def test_an_adapter_that_is_not_finite_is_not_kept(base, tmp_path):
    class Spoil(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            next(iter(model.adapted_layers().values())).lora_b.data[0, 0] = torch.inf

    trainer = make_trainer(
        adapted(base), new_callback(final_fraction=0.1), tmp_path, save_strategy="steps", save_steps=1
    )
    trainer.add_callback(Spoil())
    with pytest.raises(NonFiniteAdapterError, match="is not finite"):
        trainer.train()
    assert not (tmp_path / "checkpoint-1" / "dynamic_lora.json").exists()


def test_a_checkpoint_of_steps_that_have_changed_nothing_is_written_and_resumed(base, tmp_path):
    """All gates start at 0, and the rate of the first step of a warm-up is 0."""

    def train(resume=None):
        callback = new_callback(warmup_fraction=0.4)
        model = adapted(base, init="paper")
        make_trainer(model, callback, tmp_path, warmup_steps=2, **SAVING).train(resume_from_checkpoint=resume)
        return state_of(model)

    left_alone = train()
    resumed = train(str(tmp_path / "checkpoint-1"))
    assert all(resumed[name].equal(value) for name, value in left_alone.items())
    assert any(value.any() for name, value in resumed.items() if "lora_gate" in name)


class Start(TrainerCallback):
    """The rows a_i when training begins."""

    def on_train_begin(self, args, state, control, model, **_):
        self.rows = {name: layer.lora_a.detach().clone() for name, layer in model.adapted_layers().items()}


@pytest.mark.parametrize("init", ["inputs", "gradient"])
def test_a_start_from_the_trainers_rows_is_that_of_a_run(init, base, tmp_path):
    from dora_dist.distributed.agreement import Agreement
    from dora_dist.training.from_data.start import DataStart, spread, start_from_data

    data, one = rows(), torch.ones(())

    def loss(number):
        ids = torch.tensor([data[number]["input_ids"]])
        return model(input_ids=ids, labels=ids, num_items_in_batch=one).loss

    model = adapted(base)
    start_from_data(model, loss, DataStart(init=init, rows=spread(5, len(data)), seed=5), Agreement())
    callback = DynamicRankCallback(PruningConfig(**PRUNING), init=init, calibration_rows=5)
    trainer = make_trainer(adapted(base), callback, tmp_path)
    trainer.add_callback(seen := Start())
    trainer.train()
    for name, layer in model.adapted_layers().items():
        assert layer.lora_a.equal(seen.rows[name]), name


def test_an_adapter_that_was_cast_gets_its_dtype_back(base, tmp_path):
    """As TRL casts it on a quantized base, before the Trainer's own constructor is through."""

    def cast():
        model = adapted(base)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)
        return model

    model = cast()
    make_trainer(model, new_callback(), tmp_path)
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    trainer = make_trainer(cast(), None, tmp_path)
    trainer.add_callback(new_callback())
    with pytest.raises(ValueError, match=r"are torch\.bfloat16, but were made in torch\.float32"):
        trainer.train()


def test_an_adapter_in_16_bits_of_which_nobody_keeps_more_is_refused(base, tmp_path):
    trainer = make_trainer(adapted(base, dtype="bfloat16"), new_callback(), tmp_path)
    with pytest.raises(ValueError, match=r"made in torch\.bfloat16 .*set dtype to \"float32\""):
        trainer.train()


def test_models_and_rules_that_are_not_pruned_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"model is a LlamaForCausalLM, but .*add_dynamic_lora"):
        make_trainer(tiny_model(), new_callback(), tmp_path)
    with pytest.raises(ValueError, match=r"pruning\.rule is none"):
        make_trainer(adapted(base), new_callback(rule="none"), tmp_path)
    with pytest.raises(ValueError, match=r"gate_sensitivity, which needs gradients of the gates"):
        make_trainer(adapted(base, train_gates=False), new_callback(importance="gate_sensitivity"), tmp_path)
    with pytest.raises(ValueError, match=r"slots is 6, but pruning\.rule is prune, which fills none: leave it out"):
        make_trainer(adapted(base, slots=6), new_callback(), tmp_path)
    with pytest.raises(ValueError, match=r"init is 'lora', but must be inputs"):
        DynamicRankCallback(init="lora")


def test_rows_that_are_streamed_have_no_start(base, tmp_path):
    callback = DynamicRankCallback(PruningConfig(**PRUNING), init="inputs")
    trainer = make_trainer(adapted(base), callback, tmp_path)
    trainer.train_dataset = rows().to_iterable_dataset()
    with pytest.raises(ValueError, match=r"init needs access to training rows by number, but the train_dataset is a"):
        trainer.train()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fp16": True}, "fp16 is true"),
        ({"auto_find_batch_size": True}, "auto_find_batch_size is true"),
        ({"load_best_model_at_end": True}, "load_best_model_at_end is true, .* set it to false"),
        ({"n_gpu": 2}, "one process sees 2 GPUs"),
    ],
)
def test_settings_that_would_go_wrong_without_a_word_are_refused(changes, message, tmp_path):
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    looked_at = ("fp16", "auto_find_batch_size", "load_best_model_at_end", "n_gpu")
    seen = SimpleNamespace(**{**{name: getattr(arguments, name) for name in looked_at}, **changes})
    with pytest.raises(ValueError, match=message):
        refusals.check_settings(seen, SimpleNamespace(is_hyper_param_search=False))


@pytest.mark.parametrize(
    ("engine", "stage", "found"),
    [("FSDP", None, "FSDP"), ("DEEPSPEED", 3, "ZeRO stage 3"), ("DEEPSPEED", 1, "ZeRO stage 1")],
)
def test_engines_that_are_not_known_are_refused(engine, stage, found):
    from accelerate.utils import DistributedType

    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(distributed_type=DistributedType(engine), deepspeed_plugin=plugin)
    with pytest.raises(ValueError, match=f"the trainer runs under {found}, but"):
        refusals.check_engine(accelerator)
