"""What the doctor reads and tries on one machine."""

import os
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.tiny_run import write_config

from dora_dist.config.parse import load_config
from dora_dist.console.files import digest_sources
from dora_dist.distributed.agreement import Agreement
from dora_dist.doctor import device, inspection, node, storage
from dora_dist.doctor.device import check_device

CPU = torch.device("cpu")
MIB = 2**20


def test_requirements_come_from_the_installed_metadata(monkeypatch):
    lines = ["torch>=99", "peft>=0.1", "no-such-thing>=1", "pytest>=99; extra == 'dev'"]
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    versions, below = node.software("dora-dist")
    assert versions["torch"] == metadata.version("torch")
    assert versions["no-such-thing"] is None
    assert "pytest" not in versions
    assert below == ["torch>=99"]


def test_a_project_that_is_not_installed_says_so():
    assert node.software("no-such-distribution") == ({"no-such-distribution": None}, [])


def test_the_limit_of_a_control_group_above_this_one_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "CONTROL_GROUPS", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert node.memory_limit() > 2**20
    (tmp_path / "memory.max").write_text("1048576\n")
    assert node.memory_limit() == 2**20


def test_the_driver_is_read_from_the_kernels_file(tmp_path, monkeypatch):
    monkeypatch.setattr(node, "DRIVER_VERSION", tmp_path / "version")
    assert node.driver_version() is None
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    assert node.driver_version() == "580.65.06"


def test_one_changed_byte_of_the_source_is_seen(tmp_path):
    (tmp_path / "module.py").write_text("a = 1\n")
    before = digest_sources(tmp_path)
    (tmp_path / "module.py").write_text("a = 2\n")
    assert digest_sources(tmp_path) != before


@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_this_machine_computes_right(dtype, quantization):
    assert [check.failure for check in check_device(CPU, dtype, quantization)] == [None, None]


def test_a_wrong_product_is_found(monkeypatch):
    def off(left, right):
        return torch.matmul(left, right) * (1.0 if left.dtype == torch.float64 else 1.1)

    monkeypatch.setattr(torch.Tensor, "__matmul__", off)
    (product, _) = check_device(CPU, torch.float32, "none")
    assert product.failure == "on cpu the result is off by 0.1, and 0.001 is allowed"


def test_a_layer_that_computes_with_another_weight_is_found(monkeypatch):
    monkeypatch.setattr(
        "dora_dist.base_model.quantization.dequantized_weight", lambda layer: layer.weight.float() * 1.1
    )
    (_, layer) = check_device(CPU, torch.float32, "none")
    assert "the result is off by" in layer.failure


def test_gpus_are_described_and_one_that_does_not_answer_is_left_out(monkeypatch):
    def properties(found):
        if found.index == 1:
            raise RuntimeError("CUDA error: uncorrectable ECC error encountered")
        return SimpleNamespace(name="NVIDIA H100", uuid="11-22", major=9, minor=0)

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda found: (5, 7))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(torch.cuda, "device", lambda found: nullcontext())
    (gpu,) = device.describe_gpus([CPU, torch.device("cuda", 0), torch.device("cuda", 1)])
    assert (gpu.name, gpu.uuid, gpu.capability, gpu.free, gpu.total) == ("NVIDIA H100", "11-22", "9.0", 5, 7)


def test_a_library_that_cannot_be_loaded_is_a_finding(monkeypatch):
    def broken(*_):
        raise RuntimeError("libcudart.so cannot be opened\nand much more")

    monkeypatch.setattr(device, "_quantized", broken)
    (_, layer) = check_device(CPU, torch.float32, "nf4")
    assert layer.failure == "RuntimeError on cpu: libcudart.so cannot be opened"


def test_the_type_of_the_deepest_mount_counts(tmp_path):
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "/dev/a / ext4 rw 0 0\nserver:/x /scratch nfs4 rw 0 0\nfast /scratch/my\\040runs lustre rw 0 0\n"
        "old /data ext4 rw 0 0\nnew /data xfs rw 0 0\n"
    )
    kinds = [storage.filesystem_of(Path(path), mounts) for path in ("/home", "/scratch/run", "/scratch/my runs/1")]
    assert kinds == ["ext4", "nfs4", "lustre"]
    assert storage.filesystem_of(Path("/data/run"), mounts) == "xfs"
    assert storage.filesystem_of(Path("/data"), tmp_path / "none") is None


def test_speeds_keep_to_the_bytes_allowed(tmp_path):
    written, speed = storage.write_speed(tmp_path / "file", 13 * MIB)
    assert written == (4 + 8) * MIB == (tmp_path / "file").stat().st_size
    assert speed > 0
    assert storage.read_speed(tmp_path / "file", written) > 0
    assert storage.write_speed(tmp_path / "file", MIB) == (0, None)


def test_speeds_keep_to_the_time_allowed(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "MOST_SECONDS", 0.0)
    assert storage.write_speed(tmp_path / "file", 100 * MIB)[0] == 0


def test_a_folder_that_was_made_is_gone_afterwards_and_others_stay(tmp_path):
    (facts,) = storage.check_storage(tmp_path / "a" / "b", "here", Agreement(), measures=False)
    assert (facts.sees, facts.failure) == (True, None)
    assert os.listdir(tmp_path) == []
    (tmp_path / "mine").mkdir()
    storage.check_storage(tmp_path / "mine", "here", Agreement(), measures=True)
    assert os.listdir(tmp_path) == ["mine"]
    assert os.listdir(tmp_path / "mine") == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_nothing_is_left_after_an_interruption(tmp_path, monkeypatch, error):
    def interrupted(path, most):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(storage, "write_speed", interrupted)
    with pytest.raises(error):
        storage.check_storage(tmp_path / "a", "here", Agreement(), measures=True)
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_a_finding_of_the_rank_that_wrote(tmp_path, monkeypatch):
    def full(path, most):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "write_speed", full)
    (facts,) = storage.check_storage(tmp_path, "here", Agreement(), measures=True)
    assert facts.failure == "No space left on device"


def test_a_folder_below_a_file_is_a_finding(tmp_path):
    (tmp_path / "file").touch()
    (facts,) = storage.check_storage(tmp_path / "file" / "run", "here", Agreement(), measures=True)
    assert facts.failure == "Not a directory"


def test_a_folder_that_may_not_be_looked_into_is_a_finding(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)  # nothing is closed to root
    try:
        (facts,) = storage.check_storage(closed / "a" / "run", "here", Agreement(), measures=True)
    finally:
        os.seteuid(user)
    assert facts.failure == "Permission denied"


def test_a_rename_that_does_not_replace_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda self, target: self)
    (facts,) = storage.check_storage(tmp_path, "here", Agreement(), measures=True)
    assert "did not take its place" in facts.failure
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("version", "fact"), [("2.11.0", "sharding"), ("2.12.0", None)])
def test_a_torch_that_is_too_old_for_shards_is_not_taken_for_a_model_that_is_missing(
    version, fact, tmp_path, monkeypatch
):
    config = load_config(write_config(tmp_path, distributed={"engine": "ddp", "shard_base": True}))
    monkeypatch.setattr(inspection.torch, "__version__", version)
    found = {name: text for name, text in inspection._refusals(config).items() if text is not None}
    assert found.keys() == ({fact} if fact else set())
    assert all("update torch" in text for text in found.values())
