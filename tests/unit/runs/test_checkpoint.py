"""What makes a checkpoint complete, which one is taken, and which are deleted."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_controller import make_controller
from support.tiny_run import some_fingerprint

from dora_dist.adapter.unfolded import load_parameters
from dora_dist.config.format_version import METHOD_STATE, METHOD_TENSORS
from dora_dist.runs import checkpoint
from dora_dist.training import method_state


def make_checkpoint(run, step, sealed=True):
    folder = run / f"checkpoint-{step}"
    (folder / "global_step").mkdir(parents=True)
    (folder / "global_step" / "optimizer.pt").write_bytes(b"shard" * 100)
    (folder / "state.json").write_text("{}")
    if sealed:
        checkpoint.seal(folder)
    return folder


def test_a_sealed_checkpoint_has_no_flaw(tmp_path):
    assert checkpoint.flaw_of(make_checkpoint(tmp_path, 5)) is None


def test_an_unsealed_checkpoint_is_not_used(tmp_path):
    assert checkpoint.flaw_of(make_checkpoint(tmp_path, 5, sealed=False)) == "it was not completed"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[17] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (flip_a_bit, "has changed since it was written"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 499 bytes instead of 500"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped bit", "truncated", "missing"],
)
def test_a_damaged_checkpoint_is_not_used_and_the_older_one_is(tmp_path, harm, message):
    older, newer = make_checkpoint(tmp_path, 5), make_checkpoint(tmp_path, 10)
    harm(newer / "global_step" / "optimizer.pt")
    assert message in checkpoint.flaw_of(newer)
    found, remarks = checkpoint.find_resumable(tmp_path, "auto")
    assert found == older
    assert len(remarks) == 1
    assert message in remarks[0]


def test_the_newest_is_found_by_step_not_by_name(tmp_path):
    for step in (90, 100, 9):
        make_checkpoint(tmp_path, step)
    make_checkpoint(tmp_path, 200, sealed=False)
    (tmp_path / "checkpoint-best").mkdir()
    assert checkpoint.find_resumable(tmp_path, "auto")[0].name == "checkpoint-100"


def test_a_run_killed_in_its_first_save_starts_again(tmp_path):
    make_checkpoint(tmp_path, 5, sealed=False)
    assert checkpoint.find_resumable(tmp_path, "auto")[0] is None


def test_a_run_whose_checkpoints_are_all_damaged_is_not_silently_started_again(tmp_path):
    flip_a_bit(make_checkpoint(tmp_path, 5) / "global_step" / "optimizer.pt")
    with pytest.raises(ValueError, match=r"no checkpoint of .* can be used"):
        checkpoint.find_resumable(tmp_path, "auto")


def test_never_does_not_mix_with_existing_checkpoints(tmp_path):
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match=r"never, but .* holds checkpoint-5, .*another output_dir"):
        checkpoint.find_resumable(tmp_path, "never")


def test_going_back_does_not_mix_with_later_checkpoints(tmp_path):
    path = make_checkpoint(tmp_path, 5)
    assert checkpoint.find_resumable(tmp_path, str(path))[0] == path
    make_checkpoint(tmp_path, 10)
    with pytest.raises(ValueError, match="holds checkpoint-10"):
        checkpoint.find_resumable(tmp_path, str(path))


@pytest.mark.parametrize("resume", ["somewhere/else", "newest"])
def test_a_path_that_is_no_folder_is_refused(tmp_path, resume):
    with pytest.raises(ValueError, match="neither auto nor never nor a folder"):
        checkpoint.find_resumable(tmp_path, resume)


def names(run):
    return [path.name for path in checkpoint.checkpoints(run)]


def test_rotation_keeps_the_newest_complete_ones_and_never_the_only_one(tmp_path):
    make_checkpoint(tmp_path, 3, sealed=False)
    *_, saved = (make_checkpoint(tmp_path, step) for step in (5, 10, 100))
    checkpoint.rotate(saved, keep_last=2)
    assert names(tmp_path) == ["checkpoint-10", "checkpoint-100"]
    checkpoint.rotate(saved, keep_last=1)
    assert names(tmp_path) == ["checkpoint-100"]


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_newer_one_that_was_damaged_does_not_take_the_place_of_what_is_saved(tmp_path, keep_last):
    make_checkpoint(tmp_path, 5)
    for step in (10, 20):
        flip_a_bit(make_checkpoint(tmp_path, step) / "global_step" / "optimizer.pt")
    make_checkpoint(tmp_path, 30, sealed=False)
    found, _ = checkpoint.find_resumable(tmp_path, "auto")
    assert found.name == "checkpoint-5"
    checkpoint.rotate(saved := make_checkpoint(tmp_path, 7), keep_last)
    assert checkpoint.find_resumable(tmp_path, "auto") == (saved, [])
    assert names(tmp_path) == ["checkpoint-5", "checkpoint-7"][-keep_last:]


def test_rotation_keeps_the_best_one_that_any_kept_one_names(tmp_path):
    for step, best in ((5, 5), (10, 5), (15, 5), (20, 20)):
        folder = make_checkpoint(tmp_path, step)
        (folder / METHOD_STATE).write_text(json.dumps({"best": {"step": best}}))
    checkpoint.rotate(folder, keep_last=2)
    assert names(tmp_path) == [f"checkpoint-{step}" for step in (5, 15, 20)]
    (folder / METHOD_STATE).write_text("damaged")
    checkpoint.rotate(folder, keep_last=1)
    assert names(tmp_path) == ["checkpoint-20"]


def test_the_state_of_the_method_comes_back_bit_for_bit(tmp_path):
    saved = make_controller()
    for step in range(1, 6):
        event = saved.after_optimizer_step(step)
    assert event.final
    method_state.save_method_state(tmp_path, saved, some_fingerprint(), 1)
    loaded = make_controller()
    for layer in loaded.layers.values():
        layer.lora_a.data.zero_()
    tensors = load_file(tmp_path / METHOD_TENSORS)
    load_parameters(tensors, loaded.layers, loaded.head)
    loaded.load_state_dict(tensors, checkpoint.read_method_state(tmp_path)["step"])
    assert loaded.step == 5
    assert all(torch.equal(loaded.kept[name], mask) for name, mask in event.kept.items())
    for name, layer in saved.layers.items():
        other = loaded.layers[name]
        assert torch.equal(saved.scores[name], loaded.scores[name])
        assert torch.equal(layer.component_mask, other.component_mask)
        for part in ("lora_a", "gate", "lora_b"):
            assert torch.equal(getattr(layer, part), getattr(other, part))
