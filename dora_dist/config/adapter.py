"""The configuration of an adapter: plain values, no torch, so that a command line is parsed without waiting for it."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

ALL_LINEAR = "all-linear"
Init = Literal["lora", "paper", "adalora", "inputs", "gradient", "lora_one"]
INITS: tuple[str, ...] = get_args(Init)
"""``lora``: a_i as LoRA's, b_i = 0, c_i = 1. ``paper``: a_i and b_i Kaiming-uniform, c_i = 0. ``adalora``: a_i and
b_i normal with a standard deviation of 0.02, c_i = 0. ``inputs`` and ``gradient`` are ``lora`` with a_i of the same
length along directions from data: the principal ones of the layer's inputs, or the right singular vectors of the
gradient of its weight. ``lora_one`` is one step down that gradient."""
INPUTS = "inputs"
GRADIENT = "gradient"
LORA_ONE = "lora_one"
DRAWN_INITS = ("lora", "paper", "adalora")
"""The :data:`INITS` that need no data."""
UNIFORM = "uniform"
MLP_ONLY = "mlp-only"
RISING_WITH_DEPTH = "rising-with-depth"
STRATA = "strata"
GRADIENT_SPECTRUM = "gradient_spectrum"
WEIGHT_GRADIENT = "weight_gradient"
RANKS_FROM_DATA = (GRADIENT_SPECTRUM, WEIGHT_GRADIENT)
"""The values of ``ranks`` whose ranks are made from training rows before the first step."""
Scale = Literal["constant", "sqrt_rank"]
SCALES: tuple[str, ...] = get_args(Scale)
Routing = Literal["none", "prompt"]
ROUTINGS: tuple[str, ...] = get_args(Routing)
PROMPT = "prompt"
LEAST_MODULES = 2
"""Least number of modules that a router selects for a prompt: the gate of a single one would be 1, whatever its
probability, and would teach the router nothing."""
AdapterDtype = Literal["auto", "float32", "bfloat16", "float64"]
DTYPES: tuple[str, ...] = get_args(AdapterDtype)


@dataclass(kw_only=True)
class DynamicLoraConfig:
    """The adapter: how many rank-one components each layer starts with and which layers have them.

    Args:
        target_rank: components per layer, on average, after pruning.
        initial_rank: components per layer at the start. Null for 1.5 times target_rank, rounded up (the paper's), with
            pruning.rule prune, for 1 with grow (always less than target_rank), and for target_rank with other rules.
        slots: places for components in every layer, for pruning.rule move or grow, or ranks from data: the most that a
            layer can get. Free slots take memory but no time. Null for twice target_rank with grow and ranks from data;
            move needs a number.
        ranks: number of components of each layer: uniform, or, for a whole run with pruning.rule none, mlp-only,
            rising-with-depth, strata, the path of a plan (plan.json of a run), or from training data gradient_spectrum
            or weight_gradient. docs/method.md and docs/rules.md describe each.
        alpha: numerator of the factor that scales the update of every layer; scale sets the denominator.
        scale: constant (alpha over initial_rank, or over target_rank where that is more, in all layers for the whole
            run), or sqrt_rank (alpha over the square root of the number of components that the layer still has).
        dropout: dropout probability on the input of the components, in [0, 1).
        target_modules: all-linear (every linear layer of the text decoder that can be adapted, without the output
            head), a regular expression for full module names, or a list of names or their last parts.
        init: initial values of the components: drawn at random (lora, paper, adalora), or computed from training rows
            (inputs, gradient, lora_one). With all but lora_one, the model starts exactly as the base. docs/method.md
            describes each.
        start_from: folder of a plain LoRA adapter to go on from, of a run (RUN/adapter) or of PEFT: the model starts as
            with that adapter. Needs init lora, paper or adalora, and at least as many components in every layer;
            docs/choosing.md has the rest. Null for a new adapter.
        new_tokens: texts that become tokens of the tokenizer, such as "<call>" and "</call>". Their rows of the
            embedding, and of an output head that is not tied to it, are trained beside the components. For causal_lm,
            by dora-dist train; docs/choosing.md has the rest. Null for none.
        calibration_rows: number of training rows, spread over the run, from which a start or ranks from data are
            computed.
        dtype: dtype of the adapter's parameters. In a run, auto is float32, and under zero2 the compute dtype, of which
            DeepSpeed keeps a float32 master copy; where no such copy is kept, training in bfloat16 is refused. In
            add_dynamic_lora, auto is the dtype of the base's unquantized weights.
        train_gates: train the gates c_i. With false the layer is plain LoRA, which can be pruned but cannot regrow.
        seed: random seed of the initial values, which are the same on every rank; null for the seed of the run.
        routing: none, or prompt (MiLoRA): a router before every decoder block selects, for each prompt, the modules
            whose adapters are used. docs/routing.md has what it costs and what does not go with it.
        modules_per_prompt: number of modules that the router selects in every block, with routing prompt.
        balance_weight: weight of the loss term that balances the selection, with routing prompt.
    """

    target_rank: int = 8
    initial_rank: int | None = None
    slots: int | None = None
    ranks: str = UNIFORM
    alpha: float = 8.0
    scale: Scale = "constant"
    dropout: float = 0.1
    target_modules: str | list[str] = ALL_LINEAR
    init: Init = "lora"
    start_from: str | None = None
    new_tokens: list[str] | None = None
    calibration_rows: int = 64
    dtype: AdapterDtype = "float32"
    train_gates: bool = True
    seed: int | None = None
    routing: Routing = "none"
    modules_per_prompt: int = 3
    balance_weight: float = 1e-2

    def __post_init__(self) -> None:
        if self.target_rank < 1:
            raise ValueError(f"target_rank is {self.target_rank}, but must be at least 1")
        if self.initial_rank is not None and self.slots is None and self.initial_rank < self.target_rank:
            raise ValueError(
                f"initial_rank is {self.initial_rank}, below target_rank {self.target_rank}: pruning only removes "
                "components, so raise initial_rank (1.5 x target_rank by default) or lower target_rank; to start below "
                "it with pruning.rule grow, set slots too"
            )
        if self.start_rank < 1:
            raise ValueError(f"initial_rank is {self.initial_rank}, but must be at least 1")
        if self.slots is not None and self.slots < self.full_rank:
            raise ValueError(
                f"slots is {self.slots}, but must be at least {self.full_rank}, the rank at the start or, on average, "
                "in the end"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, but must lie in [0, 1)")
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, but must be positive")
        if self.scale not in SCALES:
            raise ValueError(f"scale is {self.scale!r}, but must be one of {', '.join(SCALES)}")
        if self.ranks != UNIFORM and self.initial_rank not in (None, self.target_rank):
            raise ValueError(
                f"ranks is {self.ranks}, which are those of the whole run, but initial_rank is {self.initial_rank}: "
                "leave initial_rank out"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, but must be one of {', '.join(DTYPES)}")
        if self.init not in INITS:
            raise ValueError(f"init is {self.init!r}, but must be one of {', '.join(INITS)}")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows is {self.calibration_rows}, but must be at least 1")
        if self.init in ("paper", "adalora") and not self.train_gates:
            raise ValueError(
                f"init {self.init!r} starts with all gates at 0, which never change unless train_gates is true"
            )
        self._check_start_from()
        self._check_new_tokens()
        self._check_routing()

    def _check_start_from(self) -> None:
        if self.start_from is None:
            return
        beside = f"start_from is {self.start_from}, but"
        if self.init not in DRAWN_INITS:
            raise ValueError(
                f"{beside} init is {self.init}, a start from data, which would write over it: set adapter.init to lora"
            )
        if self.ranks in RANKS_FROM_DATA:
            raise ValueError(
                f"{beside} ranks is {self.ranks}, which is for a new adapter: set it to uniform, or a plan"
            )
        if self.routing != "none":
            raise ValueError(f"{beside} routing is {self.routing}, which is for a new adapter: leave one of them out")

    def _check_new_tokens(self) -> None:
        texts = self.new_tokens
        if texts is None:
            return
        if not texts:
            raise ValueError("new_tokens is an empty list, but must have one text or more: leave it out for none")
        for text in texts:
            if not text or text != text.strip():
                raise ValueError(
                    f"new_tokens has {text!r}, but a token must have a text that does not begin or end with white space"
                )
            if texts.count(text) > 1:
                raise ValueError(f"new_tokens has {text!r} {texts.count(text)} times: name it once")
        if self.routing != "none":
            raise ValueError(
                f"new_tokens is set, but routing is {self.routing}, whose adapter has no place for rows of the "
                "embedding: leave one of them out"
            )

    def _check_routing(self) -> None:
        if self.routing not in ROUTINGS:
            raise ValueError(f"routing is {self.routing!r}, but must be one of {', '.join(ROUTINGS)}")
        if self.modules_per_prompt < LEAST_MODULES:
            raise ValueError(
                f"modules_per_prompt is {self.modules_per_prompt}, but must be at least {LEAST_MODULES}: the router "
                "learns from how chosen modules are weighted among each other"
            )
        if not 0 <= self.balance_weight < math.inf:
            raise ValueError(f"balance_weight is {self.balance_weight}, but must be 0 or a positive number")
        if self.routing == "none":
            return
        if self.start_rank != self.target_rank:
            raise ValueError(
                f"routing is {self.routing}, which does not go with pruning, but initial_rank is {self.start_rank} "
                f"and target_rank {self.target_rank}: set initial_rank to {self.target_rank}"
            )
        if self.init not in DRAWN_INITS:
            raise ValueError(
                f"routing is {self.routing} and init is {self.init}, but a start from data is made for modules that "
                f"see all rows: set init to {' or '.join(DRAWN_INITS)} (preset: lora does, and prunes nothing)"
            )

    @property
    def start_rank(self) -> int:
        """``initial_rank``, or its default."""
        if self.initial_rank is not None:
            return self.initial_rank
        uniform = self.ranks == UNIFORM and self.slots is None and self.routing == "none"
        return math.ceil(1.5 * self.target_rank) if uniform else self.target_rank

    @property
    def full_rank(self) -> int:
        """Components of a layer, on average, at the start or at the end, whichever are more."""
        return max(self.start_rank, self.target_rank)

    @property
    def num_slots(self) -> int:
        """Components that the tensors of a layer have room for, where ``ranks`` is uniform or from data."""
        return self.slots if self.slots is not None else self.start_rank

    def scale_of(self, rank: int) -> float:
        """The factor of the update of a layer that has ``rank`` components left, at least 1."""
        return self.alpha / (math.sqrt(rank) if self.scale == "sqrt_rank" else self.full_rank)
