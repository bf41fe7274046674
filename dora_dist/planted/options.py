"""The command line: what to plant and train, checked before expensive work."""

import argparse
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dora_dist.config.adapter import DRAWN_INITS
from dora_dist.config.pruning import FILL_SLOTS, GROW, MOVE
from dora_dist.planted.patterns import DEFAULT_KIND, PATTERNS

UNIFORM = "uniform"
ORACLE = "oracle"
METHODS = {
    UNIFORM: "LoRA of the target rank everywhere",
    "frobenius": "dynamic ranks by the paper's score, a component's share in its layer's update",
    "magnitude": "dynamic ranks by the norm of a component, not normalised per layer",
    "squared_magnitude": "dynamic ranks by its square",
    "gate_sensitivity": "dynamic ranks by the first-order effect of a component on the loss",
    "random": "dynamic ranks by chance",
    MOVE: "components of uniform LoRA that move between layers (pruning.rule move), by gate_sensitivity",
    GROW: "ranks that grow from one (pruning.rule grow)",
    ORACLE: "LoRA of the planted ranks",
}
CRITERIA = [name for name in METHODS if name not in FILL_SLOTS]
"""Methods that prune, and the baselines they are compared with."""
FIXED = (UNIFORM, ORACLE)
"""Methods whose ranks are known before the run."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command line, resolved.

    Args:
        model: folder of the base, or None for a base with random weights.
        patterns: patterns of the planted ranks.
        methods: methods to train, in the order of ``METHODS``.
        seeds: number of seeds; each has its own planted ranks, directions, text and start, and its own base if the base
            is random.
        search_seeds: number of first seeds, on which every method's learning rate is chosen.
        learning_rates: learning rates to choose from, ascending.
        target_rank: components per layer, on average: planted, and kept.
        steps: number of optimizer steps of a run.
        interval: number of optimizer steps between two events.
        batch: number of rows of a step.
        length: number of tokens of a row.
        held_out: number of rows of each of the two held-out splits.
        strength: Frobenius norm of a planted component relative to its layer's weight.
        decay: whether singular values of a layer's planted update fall as 1, 1/2, 1/3, ...; otherwise they are equal.
        kind: kind of projection, for the pattern ``one-kind``.
        scale: scale s of all adapters, whatever their rank.
        init: start of dynamic ranks.
        output: the JSON file; the picture is written beside it.
    """

    model: Path | None
    patterns: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: int
    search_seeds: int
    learning_rates: tuple[float, ...]
    target_rank: int
    steps: int
    interval: int
    batch: int
    length: int
    held_out: int
    strength: float
    decay: bool
    kind: str
    scale: float
    init: Literal["lora", "paper"]
    output: Path

    def settings(self) -> dict[str, Any]:
        """Settings that all cells of a result must share; everything else may be extended later."""
        left_out = ("patterns", "methods", "seeds", "learning_rates", "output")
        found = {name: value for name, value in asdict(self).items() if name not in left_out}
        # Only the folder's name: a result contains no paths of a machine.
        return found | {"model": self.model and self.model.name}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="dora-dist planted",
        description="Plant updates of known ranks in a teacher, train students with fixed and dynamic ranks on its "
        "distribution, and measure how well the kept ranks recover the planted ones. Continues the result in --output.",
        epilog="patterns: "
        + "; ".join(f"{name}: {text}" for name, text in PATTERNS.items())
        + ". methods: "
        + "; ".join(f"{name}: {text}" for name, text in METHODS.items()),
        allow_abbrev=False,
    )
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="the base; by default a LLaMA of random weights")
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), metavar="NAME", help="by default all")
    parser.add_argument("--methods", nargs="+", default=CRITERIA, metavar="NAME", help="by default all but the rules")
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="by default 5")
    parser.add_argument(
        "--search-seeds", type=int, default=1, metavar="N", help="seeds that choose learning rates; by default 1"
    )
    parser.add_argument(
        "--learning-rates",
        nargs="+",
        type=float,
        default=[0.015, 0.03, 0.06, 0.12],
        metavar="X",
        help="learning rates tried for all methods; by default 0.015 to 0.12",
    )
    parser.add_argument("--target-rank", type=int, default=2, metavar="R", help="by default 2")
    parser.add_argument("--steps", type=int, default=150, metavar="N", help="steps of a run; by default 150")
    parser.add_argument("--interval", type=int, default=10, metavar="N", help="steps between events; by default 10")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="rows of a step; by default 8")
    parser.add_argument("--length", type=int, default=32, metavar="N", help="tokens of a row; by default 32")
    parser.add_argument("--held-out", type=int, default=128, metavar="N", help="rows of a split; by default 128")
    parser.add_argument(
        "--strength", type=float, default=0.2, metavar="X", help="a component's norm over its weight's; by default 0.2"
    )
    parser.add_argument("--decay", action="store_true", help="planted singular values fall as 1, 1/2, 1/3, ...")
    parser.add_argument("--kind", default=DEFAULT_KIND, metavar="NAME", help=f"for one-kind; by default {DEFAULT_KIND}")
    parser.add_argument("--scale", type=float, default=1.0, metavar="S", help="scale of all adapters; by default 1")
    parser.add_argument("--init", choices=DRAWN_INITS, default="lora", help="start of dynamic ranks; by default lora")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("planted.json"),
        metavar="FILE",
        help="the result, which the same command continues, with a picture of the same name; by default ./planted.json",
    )
    return parser


def resolve(parsed: argparse.Namespace) -> Options:
    """Check the parsed command line.

    Raises:
        ValueError: an option is invalid; with its value, the rule and the option.
    """
    for name in ("seeds", "search_seeds", "target_rank", "steps", "interval", "batch", "held_out"):
        _require(getattr(parsed, name) >= 1, name, getattr(parsed, name), "be at least 1")
    _require(parsed.length >= 2, "length", parsed.length, "be at least 2")
    for name in ("strength", "scale"):
        value = getattr(parsed, name)
        _require(math.isfinite(value) and value > 0, name, value, "be positive")
    for rate in parsed.learning_rates:
        _require(math.isfinite(rate) and rate > 0, "learning_rates", rate, "be positive")
    _require(
        parsed.search_seeds <= parsed.seeds, "search_seeds", parsed.search_seeds, f"be at most --seeds {parsed.seeds}"
    )
    for option, known in (("patterns", PATTERNS), ("methods", METHODS)):
        for name in getattr(parsed, option):
            _require(name in known, option, name, f"be of {', '.join(known)}")
    _require(UNIFORM in parsed.methods, "methods", " ".join(parsed.methods), f"include {UNIFORM}, the baseline")
    growing = GROW in parsed.methods and parsed.target_rank < 2
    _require(not growing, "target_rank", parsed.target_rank, f"be at least 2 for the method {GROW}, which starts at 1")
    if parsed.model is not None:
        _require(
            (parsed.model / "config.json").is_file(), "model", parsed.model, "be a folder with a model's config.json"
        )
    folder = parsed.output.absolute().parent
    _require(parsed.output.suffix == ".json", "output", parsed.output, "end in .json")
    _require(folder.is_dir() and os.access(folder, os.W_OK), "output", parsed.output, "be in an existing folder")
    values = vars(parsed) | {
        "patterns": tuple(name for name in PATTERNS if name in parsed.patterns),
        "methods": tuple(name for name in METHODS if name in parsed.methods),
        "learning_rates": tuple(sorted(set(parsed.learning_rates))),
    }
    return Options(**values)


def _require(holds: bool, name: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"--{name.replace('_', '-')} is {value}, but must {rule}")
