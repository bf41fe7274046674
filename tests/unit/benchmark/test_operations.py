"""How many operations a step dispatches, and for how many of them the host of a GPU would wait."""

import torch

from dora_dist.benchmark.operations import Operations, count_operations
from dora_dist.benchmark.options import DYNAMIC, FLOOR, LORA, PRUNED, build_parser, resolve
from dora_dist.distributed.agreement import Agreement


def test_a_step_dispatches_fewer_operations_than_pefts():
    options = resolve(build_parser().parse_args(["--operations", "--contestants", FLOOR, LORA, DYNAMIC, PRUNED]))
    (record,) = count_operations(options.shapes[0], options, Agreement())
    found = record["contestants"]
    assert found[FLOOR]["operations"] < found[PRUNED]["operations"] < found[DYNAMIC]["operations"]
    assert found[DYNAMIC]["ratio"] <= 0.90
    assert found[PRUNED]["ratio"] <= 0.80
    # What is kept is in what is multiplied with, which is made anew when a mask changes only.
    indexed = {name for name in found[PRUNED]["by_name"] if "index" in name and name not in found[DYNAMIC]["by_name"]}
    assert indexed == set()
    for name in (DYNAMIC, PRUNED):
        assert found[name]["reads"] == found[FLOOR]["reads"] == 1, "of the base, for its attention's mask"
        assert found[name]["from_host"] == 0


def test_what_is_counted():
    with Operations() as found:
        tensor = torch.ones(4, 4)
        tensor.T.contiguous().view(16).unsqueeze(0)
        tensor.add_(torch.empty(4, 4)).detach()
        bool(tensor[tensor > 0].sum() > torch.tensor(3.0))
    figures = found.figures()
    assert figures["reads"] == 2, "the size of a selection, and a number"
    assert figures["from_host"] == 1
    counted = {"aten::ones", "aten::clone", "aten::add_", "aten::gt", "aten::nonzero", "aten::sum"}
    assert set(figures["by_name"]) == counted | {"aten::_local_scalar_dense"}
    assert figures["operations"] == sum(figures["by_name"].values())
