"""Examples of a run token by token, as training will see them, with lengths and the number of optimizer steps.

Every key of the configuration can be overridden as --section.key value, as for dora_dist.train. Nothing is trained,
and no weight is read.
"""

import argparse
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_dist.command import run_command, say
from dora_dist.config import RunConfig, load_config
from dora_dist.preview_page import Bin, Piece, Preview, ShownExample, build_page, visible
from dora_dist.quiet import quiet_libraries
from dora_dist.training_section import DEFAULT_TRAINING_ARGUMENTS

if TYPE_CHECKING:
    import numpy as np

    from dora_dist.build_data import Mixture, RunData
    from dora_dist.data.sources import PreparedSource

FEW = 3
"""Examples that are shown, unless there are more sources."""
NUM_BINS = 10
BAR_LENGTH = 40
BLOCKS = " ▏▎▍▌▋▊▉█"
UNLIMITED = 2**31 - 1
"""For data.max_length, to look at examples that are too long for the real one."""

RESET, BOLD, FAINT = "\x1b[0m", "\x1b[1m", "\x1b[2m"
SHADES = {
    False: ("\x1b[38;5;252;48;5;236m", "\x1b[38;5;252;48;5;240m"),
    True: ("\x1b[30;48;5;114m", "\x1b[30;48;5;78m"),
}
"""Of tokens that are not trained, and of those that are; neighbours differ."""
MARKS = "⟦⟧│↵⇥"
"""Without colour: around trained tokens, between tokens, before a line break. Written out where they are text."""

NOT_TEXT = "\N{REPLACEMENT CHARACTER}"
MOST_TOKENS = 8
"""That are tried together, until they are text: a character has up to four bytes, and tokens may end inside of one."""
CONTEXT = 4
"""Pieces before a token that decide whether it begins with a space."""
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which examples to look at.

    Attributes:
        number: of examples; None for a few, with one of every source.
        source: only those of this source.
        held_out: of the held-out sources instead of the training ones.
        longest: the longest ones instead of those that come first.
        truncated: only those that were truncated.
    """

    number: int | None = None
    source: str | None = None
    held_out: bool = False
    longest: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class _Pool:
    """The sources that are looked at, and which examples of them take part.

    Attributes:
        sources: of the part of the data, training or held-out; indices of examples run through all of them.
        chosen: numbers of those that are looked at.
        members: indices of the examples that take part, of each chosen source.
    """

    sources: "Sequence[PreparedSource]"
    chosen: Sequence[int]
    members: "Sequence[np.ndarray]"

    def first(self) -> "np.ndarray":
        """Index of the first example of each source, and the number of all."""
        import numpy as np

        return np.cumsum([0, *(source.counts.examples for source in self.sources)])

    def column(self, of: Callable[["PreparedSource"], "np.ndarray"]) -> "np.ndarray":
        """A number for every example of all sources."""
        import numpy as np

        return np.concatenate([of(source) for source in self.sources])


@dataclass(frozen=True)
class _Course:
    """What training sees when.

    Attributes:
        examples: in the order of training.
        steps: optimizer step of each, or None where there is no training.
        remarks: the number of steps and how it comes about.
    """

    examples: "np.ndarray"
    steps: "np.ndarray | None"
    remarks: Sequence[str]


def build_preview(config: RunConfig, choice: Choice, world_size: int) -> Preview:
    """Read the data and put together all that is shown.

    Args:
        config: of the run.
        choice: of examples.
        world_size: processes that the optimizer steps are counted for.

    Raises:
        ValueError: something that the user can mend.
    """
    import numpy as np

    from dora_dist.build_data import build_mixture

    _check_world_size(world_size, config.distributed.engine)
    limit = config.data.max_length
    config, tokenizer, data, flaw = _read(config)
    mixture = build_mixture(config.data, data.train, config.seed)
    course = _course(config, mixture, world_size, flaw)
    pool = _pool(data, mixture, choice)
    examples = [
        _show(tokenizer, pool, index, None if choice.held_out else course, limit)
        for index in _choose(pool, course, choice)
    ]
    lengths = pool.column(lambda source: source.lengths())[np.concatenate(pool.members)]
    return Preview(
        title=f"{'Held-out' if choice.held_out else 'Training'} data for {config.model.path}",
        note=_note(choice, examples, len(pool.chosen)),
        examples=examples,
        table=_table(pool, data, None if choice.held_out else mixture),
        lengths=_describe_lengths(lengths),
        bins=_bins(lengths),
        limit=limit,
        remarks=[*_left_out(pool, lengths, limit), *course.remarks],
    )


def _check_world_size(world_size: int, engine: str) -> None:
    if world_size < 1:
        raise ValueError(f"--world-size is {world_size}, but must be at least 1")
    if engine == "none" and world_size > 1:
        raise ValueError(
            f"--world-size is {world_size}, but distributed.engine is none, which is one process: set "
            "distributed.engine to zero2 or ddp"
        )


def _read(config: RunConfig) -> tuple[RunConfig, Any, "RunData", str]:
    """Configuration, tokenizer, data, and what training would stop with.

    Examples that are too long stop a training under ``data.overlong: error``, and are what one wants to see then: all
    are encoded again without a limit, in the cache too.
    """
    from dora_dist.build_data import read_data

    try:
        return config, *read_data(config), ""
    except ValueError as error:
        if config.data.overlong != "error" or "data.max_length" not in str(error):
            raise
        flaw = str(error)
    unlimited = dataclasses.replace(config, data=dataclasses.replace(config.data, max_length=UNLIMITED))
    return unlimited, *read_data(unlimited), flaw


def _course(config: RunConfig, mixture: "Mixture", world_size: int, flaw: str) -> _Course:
    """The course of the training, with ``flaw`` as a reason for none."""
    import numpy as np

    from dora_dist.settle import count_steps

    rows_per_batch, accumulation, max_steps = (
        _whole_number(config, name)
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "max_steps")
    )
    epochs = _training_argument(config, "num_train_epochs")
    if max_steps <= 0 and not 0 < epochs < math.inf:
        raise ValueError(f"training.num_train_epochs is {epochs}, but must be positive")
    batch = rows_per_batch * accumulation * world_size
    try:
        num_steps = 0 if flaw else count_steps(mixture, max_steps, epochs, batch)
    except ValueError as error:
        flaw = str(error)
    if flaw:
        remark = f"no optimizer step: training would stop with the error: {flaw}"
        return _Course(mixture.order(sum(mixture.counts)), None, [remark])
    plan = mixture.plan(num_steps, batch)
    padding = (
        f"padding: {plan.padding_share(mixture.lengths, rows_per_batch):.1%} of the computed tokens (data.batching "
        f"{mixture.batching}, {rows_per_batch} rows a micro-batch)"
    )
    processes = f"{world_size} process" + "es" * (world_size > 1)
    divisor = f"({rows_per_batch} per device x {accumulation} accumulated x {processes})"
    count = _explain_steps(mixture, num_steps, batch, None if max_steps > 0 else epochs, divisor)
    step_of_row = np.repeat(np.arange(1, num_steps + 1), batch)
    return _Course(
        plan.examples,
        np.repeat(step_of_row, np.diff(plan.starts)),
        [padding, f"{count}; computed for {processes} (--world-size)"],
    )


def _explain_steps(mixture: "Mixture", num_steps: int, batch: int, epochs: float | None, divisor: str) -> str:
    """The number of steps as what it follows from: the epochs, or where these are None ``max_steps``."""
    rows = mixture.rows_of_epochs(1)
    of = f"{rows:,} rows" + " of packed examples" * (mixture.batching == "packed")
    steps = f"{num_steps:,} optimizer step" + "s" * (num_steps != 1)
    if epochs is None:
        return f"{steps}, as training.max_steps says = {num_steps * batch / rows:.2f} epochs x {of} / {divisor}"
    total = mixture.rows_of_epochs(epochs)
    together = "" if epochs * rows == total else f" (together {total:,})"
    return f"{steps} = {epochs:g} epoch{'s' * (epochs != 1)} x {of}{together} / {divisor}" + ", rounded up" * bool(
        total % batch
    )


def _training_argument(config: RunConfig, name: str) -> Any:
    """A value of the training section, or its default."""
    from transformers import TrainingArguments

    defaults = {entry.name: entry.default for entry in dataclasses.fields(TrainingArguments)}
    return {**defaults, **DEFAULT_TRAINING_ARGUMENTS, **config.training}[name]


def _whole_number(config: RunConfig, name: str) -> int:
    value = _training_argument(config, name)
    if not isinstance(value, int) or (value < 1 and name != "max_steps"):
        least = "" if name == "max_steps" else " of at least 1"
        raise ValueError(f"training.{name} is {value!r}, but must be a whole number{least}")
    return value


def _pool(data: "RunData", mixture: "Mixture", choice: Choice) -> _Pool:
    """The sources of the choice.

    Raises:
        ValueError: there is no such source.
    """
    import numpy as np

    sources, key = (data.evaluation, "data.eval") if choice.held_out else (data.train, "data.train")
    if not sources:
        raise ValueError("--eval is given, but there is no held-out data: set data.eval")
    names = [source.name for source in sources]
    if choice.source is not None and choice.source not in names:
        raise ValueError(f"--source is {choice.source!r}, but {key} has {', '.join(names)}")
    chosen = [number for number, name in enumerate(names) if choice.source in (None, name)]
    ends = np.cumsum([source.counts.examples for source in sources])
    members = [np.arange(end - source.counts.examples, end) for end, source in zip(ends, sources, strict=True)]
    members = members if choice.held_out else mixture.members
    return _Pool(sources, chosen, [members[number] for number in chosen])


def _choose(pool: _Pool, course: _Course, choice: Choice) -> list[int]:
    """Indices of the examples to show, in the order in which they are shown."""
    import numpy as np

    members = np.concatenate(pool.members)
    removed = pool.column(lambda source: source.dataset.data.column("removed").to_numpy())
    # Training first; what it never reaches can be asked for too.
    order = members if choice.held_out else np.concatenate([course.examples, members])
    order = order[np.sort(np.unique(order, return_index=True)[1])]
    order = order[np.isin(order, members)]
    if choice.truncated:
        order = order[removed[order] > 0]
    if choice.longest:
        lengths = pool.column(lambda source: source.lengths()) + removed
        order = order[np.argsort(-lengths[order], kind="stable")]
    if choice.longest or choice.truncated:
        return order[: choice.number or FEW].tolist()
    number = choice.number or max(FEW, len(pool.chosen))
    source_of = np.searchsorted(pool.first(), order, side="right")
    firsts = np.sort(np.unique(source_of, return_index=True)[1])
    others = np.setdiff1d(np.arange(len(order)), firsts)
    return order[np.sort(np.concatenate([firsts, others])[:number])].tolist()


def _note(choice: Choice, examples: Sequence[ShownExample], num_sources: int) -> str:
    """Which examples are shown."""
    if not examples:
        return "no example was truncated"
    which = "the longest" if choice.longest else "the first"
    which += " of those that were truncated" * choice.truncated
    if not choice.longest:
        which += " in the order of the files" if choice.held_out else " in the order of training"
        which += ", as many sources as there is room for" * (num_sources > 1 and not choice.truncated)
    joined = any(len(piece.ids) > 1 for example in examples for piece in example.pieces)
    hint = "; tokens that are text only together are shown as one" * joined
    return f"{len(examples)} example{'s' * (len(examples) > 1)}: {which}{hint}"


def _show(tokenizer: Any, pool: _Pool, index: int, course: _Course | None, limit: int) -> ShownExample:
    """One example, title and tokens."""
    import numpy as np

    from dora_dist.data.encode import IGNORED, labels_of

    first = pool.first()
    number = int(np.searchsorted(first, index, side="right")) - 1
    source = pool.sources[number]
    row = source.dataset[int(index - first[number])]
    ids = row["input_ids"]
    trained = [label != IGNORED for label in labels_of(ids, row["spans"])]
    parts = [f"{len(ids):,} tokens", f"{sum(trained):,} trained ({sum(trained) / len(ids):.1%})"]
    if row["removed"]:
        parts.append(f"truncated by {row['removed']:,} tokens")
    if len(ids) > limit:
        parts.append(f"{len(ids) - limit:,} tokens more than data.max_length")
    if course is not None and course.steps is not None:
        when = np.flatnonzero(course.examples == index)
        parts.append(f"first in optimizer step {course.steps[when[0]]:,}" if len(when) else "not reached by the run")
    return ShownExample(
        title=f"{source.name}, {row['place']}: {', '.join(parts)}", pieces=split_tokens(tokenizer, ids, trained)
    )


def split_tokens(tokenizer: Any, ids: Sequence[int], trained: Sequence[bool]) -> list[Piece]:
    """Tokens with the text that each of them adds.

    Tokens that are text only together (the bytes of a character) become one piece; bytes that are never text, and
    tokens without any, are shown by their names. Otherwise the pieces' texts together are the decoded text.

    Args:
        tokenizer: of the ids.
        ids: of the tokens.
        trained: whether each of them is; no piece is both.
    """
    names = [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]
    control = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    control |= set(tokenizer.all_special_ids)
    pieces: list[Piece] = []
    starts: list[int] = []  # of pieces that the next one is decoded with
    first = 0
    while first < len(ids):
        end, text = _next_text(tokenizer, ids, names, trained, first, starts[-CONTEXT:])
        starts = [*starts, first] if text is not None else []
        pieces.append(
            Piece(
                text=text or _name_bytes(names[first]),
                position=first,
                ids=tuple(ids[first:end]),
                names=tuple(names[first:end]),
                trained=trained[first],
                special=ids[first] in control or not text,
            )
        )
        first = end
    return pieces


def _next_text(
    tokenizer: Any,
    ids: Sequence[int],
    names: Sequence[str],
    trained: Sequence[bool],
    first: int,
    context: Sequence[int],
) -> tuple[int, str | None]:
    """End and text of the piece that starts at ``first``; None for a token that is no text."""
    begin = context[0] if context else first

    def decode(end: int) -> str:
        return tokenizer.decode(ids[begin:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    before = decode(first) if begin < first else ""
    for end in range(first + 1, min(first + MOST_TOKENS, len(ids)) + 1):
        if trained[end - 1] != trained[first]:
            break
        after = decode(end)
        text = after[len(before) :]
        # The character may also stand in the text itself.
        if after.startswith(before) and (NOT_TEXT not in text or _is_text(names[first:end])):
            return end, text
    return first + 1, None


def _is_text(names: Sequence[str]) -> bool:
    try:
        b"".join(map(_bytes_of, names)).decode()
    except UnicodeDecodeError:
        return False
    return True


def _bytes_of(name: str) -> bytes:
    """The bytes that the name of a token stands for."""
    if match := BYTE_NAME.fullmatch(name):
        return bytes([int(match[1], 16)])
    letters = _byte_letters()
    if all(letter in letters for letter in name):
        return bytes(letters[letter] for letter in name)
    return name.encode("utf-8", "surrogatepass")


@functools.cache
def _byte_letters() -> dict[str, int]:
    """The alphabet of byte-level tokenizers (Radford et al. 2019): printable bytes stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def _name_bytes(name: str) -> str:
    """``<0xE4>`` for every byte that is no text."""
    if BYTE_NAME.fullmatch(name):
        return name
    text = _bytes_of(name).decode("utf-8", "surrogateescape")
    return "".join(f"<0x{ord(c) - 0xDC00:02X}>" if "\udc80" <= c <= "\udcff" else c for c in text)


def _table(pool: _Pool, data: "RunData", mixture: "Mixture | None") -> list[tuple[str, ...]]:
    """Sources and what became of their rows, with their shares in a mixture where there is one."""
    last = ("also trained on",) if mixture is None else ("a pass", "share")
    columns = (
        "source",
        "format",
        "rows",
        "examples",
        "tokens",
        "trained",
        "longest",
        "truncated",
        "dropped",
        "bad rows",
    )
    lines = [(*columns, *last)]
    rows = [(pool.sources[n].name, pool.sources[n].format, [n]) for n in pool.chosen]
    if len(rows) > 1:
        rows.append(("together", "", list(pool.chosen)))
    for name, row_format, numbers in rows:
        sources = [pool.sources[number] for number in numbers]
        total = Counter[str]()
        for source in sources:
            total.update(dataclasses.asdict(source.counts))
        if mixture is None:
            last = (f"{sum(data.overlap[source.name] for source in sources):,}",)
        else:
            per_pass = sum(mixture.counts[number] for number in numbers)
            last = (f"{per_pass:,}", f"{per_pass / sum(mixture.counts):.1%}")
        figures = (
            f"{total['rows']:,}",
            f"{total['examples']:,}",
            f"{total['tokens']:,}",
            f"{total['trained_tokens'] / total['tokens']:.1%}",
            f"{max(int(source.lengths().max()) for source in sources):,}",
            *(f"{total[count]:,}" for count in ("truncated", "overlong", "bad")),
        )
        lines.append((name, row_format, *figures, *last))
    return lines


def _left_out(pool: _Pool, lengths: "np.ndarray", limit: int) -> list[str]:
    """What was cut or left out, and where it is listed."""
    remarks = []
    for number in pool.chosen:
        source = pool.sources[number]
        listed = f" (listed in {source.folder})" if source.counts.bad or source.counts.overlong else ""
        remarks += [f"{source.name}: {remark}{listed}" for remark in source.counts.remarks()]
    if longer := int((lengths > limit).sum()):
        remarks.append(f"{longer:,} of {len(lengths):,} examples are longer than data.max_length {limit:,}")
    return remarks


def _describe_lengths(lengths: "np.ndarray") -> str:
    import numpy as np

    median, most, nearly = np.quantile(lengths, (0.5, 0.9, 0.99), method="higher")
    return (
        f"{len(lengths):,} examples: shortest {lengths.min():,}, median {median:,}, 90% up to {most:,}, 99% up to "
        f"{nearly:,}, longest {lengths.max():,}"
    )


def _bins(lengths: "np.ndarray") -> list[Bin]:
    """About :data:`NUM_BINS` bins of a round width."""
    import numpy as np

    least, longest = int(lengths.min()), int(lengths.max())
    wanted = (longest - least + 1) / NUM_BINS
    width = next(n for power in range(12) for n in (10**power, 2 * 10**power, 5 * 10**power) if n >= wanted)
    edges = np.arange(least // width, longest // width + 2) * width
    counts = np.histogram(lengths, bins=edges - 0.5)[0]
    return [
        Bin(max(least, int(low)), min(longest, int(high) - 1), int(count))
        for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def render(preview: Preview, colour: bool) -> str:
    """The preview for a terminal, or without colour for a file."""
    bold, end = (BOLD, RESET) if colour else ("", "")
    said = (
        f"{SHADES[True][0]}trained{RESET} {SHADES[False][0]}not trained{RESET}"
        if colour
        else "⟦trained│tokens⟧, not trained│tokens, ↵ line break"
    )
    blocks = [f"{bold}{visible(preview.title)}{end}\n{visible(preview.note)}; {said}"]
    body = _coloured if colour else _plain
    blocks += [f"{bold}{visible(example.title)}{end}\n{body(example.pieces)}" for example in preview.examples]
    blocks += [
        _aligned(preview.table),
        "\n".join([f"lengths of {preview.lengths}", *_bars(preview)]),
        "\n".join(map(visible, preview.remarks)),
    ]
    return "\n\n".join(blocks)


def _coloured(pieces: Sequence[Piece]) -> str:
    parts = []
    for number, piece in enumerate(pieces):
        style = SHADES[piece.trained][number % 2] + BOLD * piece.special
        # A background would run on to the end of the line.
        text = visible(piece.text).replace("\n", f"{FAINT}↵{RESET}\n{style}")
        parts.append(f"{style}{text}{RESET}")
    return "".join(parts)


def _plain(pieces: Sequence[Piece]) -> str:
    runs = []
    for trained, run in itertools.groupby(pieces, key=lambda piece: piece.trained):
        text = "│".join(visible(piece.text, MARKS).replace("\n", "↵\n") for piece in run)
        runs.append(f"⟦{text}⟧" if trained else text)
    return "".join(runs)


def _aligned(table: Sequence[Sequence[str]]) -> str:
    rows = [[visible(cell) for cell in row] for row in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row[:2], widths[:2], strict=True)]
        cells += [f"{cell:>{width}}" for cell, width in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _bars(preview: Preview) -> Iterator[str]:
    width = max(len(entry.label) for entry in preview.bins)
    for number, entry in enumerate(preview.bins):
        # A bin that is not empty can be seen.
        eighths = max(round(entry.count / preview.most * BAR_LENGTH * 8), min(entry.count, 1))
        bar = "█" * (eighths // 8) + BLOCKS[eighths % 8].strip()
        mark = preview.limit_mark(number)
        yield f"  {entry.label:>{width}}  {bar} {entry.count:,}" + f"  ◂ {mark}" * bool(mark)


def build_parser() -> argparse.ArgumentParser:
    """The command line, without the overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m dora_dist.preview",
        usage="%(prog)s CONFIG [--section.key value ...] [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of the run, see configs/")
    parser.add_argument(
        "--examples",
        type=int,
        metavar="N",
        help=f"how many to show; by default {FEW}, and one of every source at least",
    )
    parser.add_argument("--source", metavar="NAME", help="look at this source only")
    parser.add_argument("--eval", action="store_true", help="look at the held-out sources instead of the training ones")
    parser.add_argument("--longest", action="store_true", help="show the longest examples instead of the first ones")
    parser.add_argument("--truncated", action="store_true", help="show only examples that were truncated")
    parser.add_argument(
        "--world-size",
        type=int,
        metavar="N",
        help="processes to count steps for; by default WORLD_SIZE of the environment, or 1",
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as a page, too")
    parser.add_argument(
        "--color", choices=("auto", "always", "never"), default="auto", help="by default on a terminal, unless NO_COLOR"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the preview.

    Raises:
        ValueError: something that the user can mend.
    """
    quiet_libraries()
    options, overrides = build_parser().parse_known_args(arguments)
    if not options.config.is_file():
        raise ValueError(f"there is no file {options.config}: give the YAML of the run, see configs/")
    if options.examples is not None and options.examples < 1:
        raise ValueError(f"--examples is {options.examples}, but must be at least 1")
    if options.html is not None and (options.html.is_dir() or not options.html.parent.is_dir()):
        raise ValueError(f"--html is {options.html}, but must be a file in a folder that exists")
    world_size = options.world_size if options.world_size is not None else int(os.environ.get("WORLD_SIZE", "1"))
    choice = Choice(
        number=options.examples,
        source=options.source,
        held_out=options.eval,
        longest=options.longest,
        truncated=options.truncated,
    )
    config = load_config(options.config, overrides)
    # Standard output is for the preview; libraries write there too (DeepSpeed, a tokenizer's own code).
    with contextlib.redirect_stdout(sys.stderr):
        preview = build_preview(config, choice, world_size)
    if options.html is not None:
        options.html.write_text(build_page(preview), encoding="utf-8")
    _print(render(preview, _in_colour(options.color)))
    if options.html is not None:
        say(f"page written to {options.html}")


def _in_colour(wanted: str) -> bool:
    if wanted != "auto":
        return wanted == "always"
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _print(text: str) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that cannot show a character must not end the command.
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Whoever reads has seen enough (head, less); the interpreter flushes again when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    run_command(main)
