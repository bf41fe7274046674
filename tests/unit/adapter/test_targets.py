import pytest
from bitsandbytes.nn import Linear4bit
from support.architectures import skeleton_of
from support.tiny_encoders import tiny_summarizer
from support.tiny_models import PROJECTIONS, tiny_model
from torch import Tensor, nn

from dora_dist.adapter.targets import resolve_targets


def endings(names: list[str]) -> set[str]:
    return {name.rsplit(".", 1)[-1] for name in names}


@pytest.mark.parametrize("tied", [True, False])
def test_all_linear_is_every_linear_layer_but_the_head(tied):
    names = resolve_targets(tiny_model(tie_word_embeddings=tied), "all-linear")
    assert names == sorted(names)
    assert len(names) == 2 * len(PROJECTIONS)
    assert endings(names) == set(PROJECTIONS)


def test_all_linear_is_the_text_decoder_of_a_model_with_a_tower():
    skeleton = skeleton_of("gemma3 with a tower")
    names = resolve_targets(skeleton, "all-linear")
    assert len(names) == 2 * len(PROJECTIONS)
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert resolve_targets(skeleton, r".*vision_tower.*\.0\.mlp\.fc1")  # may be named


def test_all_linear_is_encoder_and_decoder_where_both_are_text():
    stacks = {name.split(".")[1] for name in resolve_targets(tiny_summarizer("bart"), "all-linear")}
    assert stacks == {"encoder", "decoder"}


def test_a_layer_that_computes_in_a_way_of_its_own_is_left_out_and_refused_where_it_is_named():
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "own": Scaled(2, 2)})
    assert resolve_targets(model, "all-linear") == ["plain"]
    with pytest.raises(ValueError, match=r"takes own, which is a .*Scaled.*leave own out of adapter\.target_modules"):
        resolve_targets(model, ["plain", "own"])


def test_the_head_cannot_be_named_either():
    with pytest.raises(ValueError, match="'lm_head' matches no linear layer"):
        resolve_targets(tiny_model(), ["q_proj", "lm_head"])


def test_quantized_layers_count_as_linear():
    model = nn.Sequential(Linear4bit(4, 4), nn.ReLU(), nn.Linear(4, 4))
    assert resolve_targets(model, "all-linear") == ["0", "2"]


@pytest.mark.parametrize(
    ("specification", "expected"),
    [
        (["q_proj"], ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["self_attn.v_proj", "v_proj"], ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"]),
        (r".*\.0\.self_attn\.[qk]_proj", ["model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"]),
    ],
)
def test_names_endings_and_expressions_find_their_layers(specification, expected):
    assert resolve_targets(tiny_model(), specification) == expected


@pytest.mark.parametrize("specification", [["proj"], ["q_proj", "query"], "q_proj", r".*\.9\..*", []])
def test_what_matches_nothing_is_refused_with_a_list_of_what_there_is(specification):
    with pytest.raises(ValueError, match="matches no linear layer") as refusal:
        resolve_targets(tiny_model(), specification)
    assert all(name in str(refusal.value) for name in PROJECTIONS)
    assert "model.layers.0.mlp.down_proj" in str(refusal.value)


def test_a_broken_expression_is_refused():
    with pytest.raises(ValueError, match="not a regular expression"):
        resolve_targets(tiny_model(), "*.q_proj")
