"""A checkpoint of everything, written and read back in one process under no engine."""

from collections import Counter
from pathlib import Path

import pytest
import safetensors.torch
import torch
from support.tiny_controller import make_controller
from support.tiny_run import some_fingerprint
from transformers.trainer_pt_utils import set_rng_state_for_device

from dora_dist.base_model.recomputation import Recomputation
from dora_dist.config.format_version import METHOD_STATE, METHOD_TENSORS
from dora_dist.console import files
from dora_dist.distributed.agreement import Agreement
from dora_dist.distributed.preemption import PreemptionNotice
from dora_dist.runs import records
from dora_dist.runs.trackers import Trackers
from dora_dist.training import checkpointing
from dora_dist.training.checkpointing import Checkpointer
from dora_dist.training.parts import LoopSettings, TrainingParts
from dora_dist.training.skipped_steps import SkipPolicy

STEP = 4


class Loop:
    """What a checkpoint is made of, without a Trainer."""

    def __init__(self, run: Path):
        self.run = run
        self.controller = make_controller()
        agreement = Agreement()
        parts = TrainingParts(
            controller=self.controller,
            agreement=agreement,
            records=records.RunRecords(run, writes=True),
            evaluator=None,
            notice=PreemptionNotice(),
            skip_policy=SkipPolicy(agreement, 0),
            trackers=Trackers(),
        )
        settings = LoopSettings(
            engine="none",
            timeout_minutes=1,
            data_start=None,
            rank_choice=None,
            adapter_dtype=torch.float32,
            lora_plus_ratio=1.0,
            equilibrium_weight=0.1,
            keep_last=2,
            fingerprint=some_fingerprint(),
            recomputation=Recomputation(0, 2),
        )
        trained = {f"{name}.lora_b": layer.lora_b for name, layer in self.controller.layers.items()}
        self.parameters = list(trained.values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.records = parts.records
        self.checkpointer = Checkpointer(parts, settings, self.optimizer, self.scheduler, None, trained)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            for number, parameter in enumerate(self.parameters):
                parameter.grad = torch.full_like(parameter, 1.0 + number + step)
            self.optimizer.step()
            self.scheduler.step()
            self.records.metrics(step, {"loss": 1.0})
            event = self.controller.after_optimizer_step(step)
            if event is not None:
                self.records.event(event)

    def save(self, step: int) -> Path:
        folder = self.run / f"checkpoint-{step}"

        def write() -> None:
            folder.mkdir()
            torch.save({}, folder / "rng_state.pth")

        self.checkpointer.save(step, write)
        return folder

    def state(self) -> dict[str, torch.Tensor]:
        moments = {f"moment {n}": self.optimizer.state[p]["exp_avg"] for n, p in enumerate(self.parameters)}
        weights = {f"weight {n}": parameter.detach() for n, parameter in enumerate(self.parameters)}
        rate = {"rate": torch.tensor(self.optimizer.param_groups[0]["lr"])}
        return {**self.controller.state_dict(), **moments, **weights, **rate}


@pytest.fixture
def saved(tmp_path):
    """A run of four steps with its checkpoint, which has gone on to step 5 (the final event) since."""
    loop = Loop(tmp_path / "run")
    loop.train(1, STEP)
    folder = loop.save(STEP)
    return loop, folder


def test_a_run_that_is_restored_takes_the_same_course(saved):
    loop, folder = saved
    loop.train(STEP + 1, 6)
    events = (loop.run / records.ALLOCATION).read_text()
    resumed = Loop(loop.run)
    resumed.checkpointer.restore(folder)
    assert resumed.controller.step == STEP
    assert len(records.read_events(loop.run / records.ALLOCATION)) == events.count("\n") - 1
    resumed.train(STEP + 1, 6)
    old, new = loop.state(), resumed.state()
    assert old.keys() == new.keys()
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert (loop.run / records.ALLOCATION).read_text() == events


def test_each_file_of_the_method_is_read_once(saved, monkeypatch):
    loop, folder = saved
    read, read_text, safe_open = Counter(), Path.read_text, safetensors.torch.safe_open

    def reading(path, *args, **kwargs):
        read[path.name] += 1
        return read_text(path, *args, **kwargs)

    def opening(path, *args, **kwargs):
        read[Path(path).name] += 1
        return safe_open(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", reading)
    monkeypatch.setattr(safetensors.torch, "safe_open", opening)
    resumed = Loop(loop.run)
    resumed.checkpointer.restore(folder)
    resumed.checkpointer.restore_random_states(1, lambda: None)
    assert {name: read[name] for name in (METHOD_STATE, METHOD_TENSORS)} == {
        METHOD_STATE: 1,
        METHOD_TENSORS: 1,
    }


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_text('{"step": 2, "num'), None])
def test_the_events_come_from_the_checkpoint_whatever_became_of_the_records(saved, tmp_path, harm):
    loop, folder = saved
    path = loop.run / records.ALLOCATION
    events = path.read_text()
    assert events, "the test would prove nothing"
    if harm is not None:
        harm(path)
    run = loop.run if harm is not None else tmp_path / "another output_dir"
    Loop(run).checkpointer.restore(folder)
    assert (run / records.ALLOCATION).read_text() == events


def test_a_checkpoint_of_another_folder_leaves_no_record_of_the_course_before_it(saved, tmp_path):
    loop, folder = saved
    other = Loop(tmp_path / "other")
    other.train(1, STEP)
    Loop(other.run).checkpointer.restore(folder)
    assert records.read_metrics(other.run) == []
    assert (other.run / records.ALLOCATION).read_text() == (folder / records.ALLOCATION).read_text()
    (tmp_path / "link").symlink_to(loop.run)
    Loop(loop.run).checkpointer.restore(tmp_path / "link" / folder.name)
    assert [line["step"] for line in records.read_metrics(loop.run)] == list(range(1, STEP + 1))


def test_a_checkpoint_has_all_events_though_their_file_was_deleted_while_the_run_went_on(tmp_path):
    loop = Loop(tmp_path / "run")
    loop.train(1, 2)
    before = (loop.run / records.ALLOCATION).read_text()
    (loop.run / records.ALLOCATION).unlink()
    loop.train(3, STEP)
    after = (loop.save(STEP) / records.ALLOCATION).read_text()
    assert before
    assert after == before + (loop.run / records.ALLOCATION).read_text()


def test_random_states_are_restored_on_as_many_ranks_and_seeded_on_others(saved, monkeypatch):
    loop, folder = saved
    resumed, loaded = Loop(loop.run), []
    resumed.checkpointer.restore(folder)
    resumed.checkpointer.restore_random_states(1, lambda: loaded.append(True))
    assert loaded == [True]
    seeds = []
    monkeypatch.setattr(checkpointing, "set_seed", lambda seed, device_specific: seeds.append((seed, device_specific)))
    state = files.read_json(folder / METHOD_STATE)
    files.write_json(folder / METHOD_STATE, {**state, "processes": 2})
    resumed.checkpointer.restore(folder)
    for seed in (1, 1, 2):
        resumed.checkpointer.restore_random_states(seed, lambda: pytest.fail("there is no state of this rank"))
    assert seeds[0] == seeds[1] != seeds[2]
    assert all(device_specific for _, device_specific in seeds)


class Gpus:
    """The random states of the GPUs that a process sees, for torch's functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seeds: list[int]) -> None:
        self.states = [torch.tensor([seed], dtype=torch.uint8) for seed in seeds]
        for module in (torch.cuda, torch.cuda.random):
            monkeypatch.setattr(module, "get_rng_state", lambda device: self.states[self._number(device)])
            monkeypatch.setattr(module, "set_rng_state", self._set)
        monkeypatch.setattr(torch.cuda.random, "device_count", lambda: len(self.states))

    def _set(self, state: torch.Tensor, device: torch.device | int) -> None:
        self.states[self._number(device)] = state

    @staticmethod
    def _number(device: torch.device | int) -> int:
        return device if isinstance(device, int) else device.index


@pytest.mark.parametrize(("there", "place"), [(8, 4), (4, 0), (1, 0)])
def test_a_gpu_goes_on_with_its_random_state_wherever_its_rank_is_placed(tmp_path, monkeypatch, capfd, there, place):
    """Rank 4 of 8, the first one of its node of four GPUs: goes on as the fifth of a node of eight, in its place, or
    where it sees its own GPU only."""
    path = tmp_path / "rng_state_4.pth"
    gpus = Gpus(monkeypatch, [77, 1, 2, 3])
    torch.save({"cpu": torch.get_rng_state(), "cuda": torch.cuda.random.get_rng_state_all()}, path)
    checkpointing.keep_device_state(path, torch.device("cuda", 0))
    gpus = Gpus(monkeypatch, [10 + number for number in range(there)])
    set_rng_state_for_device("CUDA", torch.cuda, torch.load(path), is_distributed=True)
    checkpointing.restore_device_state(path, torch.device("cuda", place))
    assert [int(state) for state in gpus.states] == [77 if number == place else 10 + number for number in range(there)]
    assert "Didn't manage" not in capfd.readouterr().err


def test_a_random_state_that_a_gpu_does_not_take_ends_the_run(saved, monkeypatch):
    loop, folder = saved
    path, device = folder / "rng_state.pth", torch.device("cuda", 0)
    Gpus(monkeypatch, [1])
    resumed = Loop(loop.run)
    resumed.checkpointer.restore(folder)
    resumed.checkpointer._agreement.device = device
    resumed.checkpointer.restore_random_states(1, lambda: None)  # an earlier version kept none
    checkpointing.keep_device_state(path, device)
    Gpus(monkeypatch, [])
    with pytest.raises(IndexError):
        resumed.checkpointer.restore_random_states(1, lambda: None)
