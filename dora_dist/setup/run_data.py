"""From the ``data`` section to examples on disk and a plan of the training."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from dora_dist.base_model import load
from dora_dist.base_model.new_tokens import add_tokens
from dora_dist.config.checks import nearest
from dora_dist.config.data import DataConfig, SourceConfig
from dora_dist.config.run import RunConfig
from dora_dist.config.tasks import CAUSAL_LM, TASKS
from dora_dist.data.cache import NoExamplesError, first_rows, prepare_source
from dora_dist.data.encoding.chat import ChosenTemplate, choose_template, writes_date
from dora_dist.data.encoding.classification import class_names
from dora_dist.data.encoding.encoder import ControlTokensError, EncodingRules
from dora_dist.data.mixture import Mixture, cap_examples, hold_back, pass_counts
from dora_dist.data.prepared import PreparedSource
from dora_dist.data.reading.files import Location, locate
from dora_dist.data.reading.split import SplitLocation
from dora_dist.data.row_formats import FORMATS, read_fields, tell_format, what_is_said

MOST_WORKERS = 8
MOST_NAMED = 20
"""Labels that an error lists."""
DATED = (
    "the chat template writes the date: rows keep that of the day on which they were prepared, so that a resumed run "
    "reads the same; data.chat_template_kwargs sets it where the template has a variable for it"
)


@dataclass(frozen=True, kw_only=True)
class RunData:
    """All data of a run.

    Attributes:
        train: training sources, in the order of the configuration.
        evaluation: held-out sources.
        template: chat template of the sources that have conversations, or None where none has.
        overlap: held-out source -> number of its examples that are also trained on.
        notes: what a user should know of the data as a whole.
        labels: names of the classes, in the order of their numbers; None where there are none.
    """

    train: list[PreparedSource]
    evaluation: list[PreparedSource]
    template: str | None
    overlap: dict[str, int]
    notes: list[str]
    labels: list[str] | None = None

    def remarks(self) -> list[str]:
        """:attr:`notes`, and what a user should know of each source."""
        held_out = [f"held-out {remark}" for source in self.evaluation for remark in source.remarks()]
        return [*self.notes, *(remark for source in self.train for remark in source.remarks()), *held_out]

    def examples(self) -> Dataset:
        """The training examples of all sources, one source after the other."""
        return concatenate_datasets([source.dataset for source in self.train])

    def some_have_no_answer(self) -> bool:
        """Of sources of questions: whether a text may have no answer, as in SQuAD v2."""
        sources = (*self.train, *self.evaluation)
        return any(bool((source.lengths("answers") == 0).any()) for source in sources)


def read_data(config: RunConfig) -> tuple[PreTrainedTokenizerBase, RunData]:
    """The tokenizer of the model, with the new tokens of the run, and all data; see :func:`prepare_data`.

    Raises:
        ValueError: the tokenizer, a new token or the data cannot be used.
    """
    load.find_model(config.model.path)
    tokenizer = load.load_tokenizer(config.model.path, config.model.trust_remote_code)
    if config.adapter.new_tokens is not None:
        add_tokens(tokenizer, config.adapter.new_tokens)
    return tokenizer, prepare_data(config.data, tokenizer, config.task, config.seed)


def prepare_data(
    config: DataConfig, tokenizer: PreTrainedTokenizerBase, task: str = CAUSAL_LM, seed: int = 0
) -> RunData:
    """Read, check and encode all sources, or find them in the cache. Without any process group.

    Sets the tokenizer's chat template to the one that conversations were rendered with, so that it is saved with the
    adapter.

    Args:
        config: the configuration's section ``data``.
        tokenizer: the model's tokenizer.
        task: the run's task.
        seed: seed of the run, which chooses among the examples of a source that has ``max_examples``.

    Raises:
        ValueError: data that cannot be used, with file, row and field.
    """
    if task != CAUSAL_LM and tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer has neither a padding nor an end-of-sequence token, and task {task} pads its batches: give "
            "it one of them"
        )
    found = _find_sources(config, bool(tokenizer.chat_template), TASKS[task].formats)
    _check_alike(found["train"], found["eval"])
    notes = _unlike_what_is_served(found["train"], tokenizer)
    chats = [source for entries in found.values() for source in entries if source.as_chat]
    template = None
    named = config.chat_template != "auto" or config.chat_template_kwargs
    if chats or named:  # a name that is wrong is refused in any case
        template = choose_template(tokenizer, config.chat_template, config.chat_template_kwargs)
    _check_chats_are_there(config, bool(chats))
    template = template if chats else None
    prepared = _prepare_all(config, found, tokenizer, template)
    if template is not None:
        tokenizer.chat_template = template.text
    seen = np.concatenate([source.keys() for source in prepared["train"]])
    seen = seen[np.concatenate(_members(config, prepared["train"], seed))]
    overlap = {source.name: int(np.isin(source.keys(), seen).sum()) for source in prepared["eval"]}
    notes += [template.origin] if template is not None and template.bundled else []
    notes += [DATED] if template is not None and writes_date(tokenizer, template.text) else []
    if config.eval_share is not None:
        notes += _held_out_shares(str(config.eval), prepared["train"], prepared["eval"])
    has_classes = TASKS[task].has_labels and config.labels == "classes"
    return RunData(
        train=prepared["train"],
        evaluation=prepared["eval"],
        template=None if template is None else template.text,
        overlap=overlap,
        notes=[*notes, *_warnings(prepared["train"], prepared["eval"], overlap)],
        labels=find_classes(prepared["train"], prepared["eval"]) if has_classes else None,
    )


def _held_out_shares(share: str, train: Sequence[PreparedSource], held_out: Sequence[PreparedSource]) -> Iterator[str]:
    """How many rows of every source are held out.

    Raises:
        ValueError: none at all.
    """
    rows = {source.name: source.counts.rows for source in held_out}
    if not rows:
        names = ", ".join(f"{source.name} has {source.counts.rows}" for source in train)
        raise ValueError(
            f"data.eval is {share}, which holds out no row that can be used ({names}): raise the share, or name "
            "held-out files"
        )
    for source in train:
        out = rows.get(source.name, 0)
        yield f"{source.name}: {out:,} of {out + source.counts.rows:,} rows are held out (data.eval {share})"


def find_classes(train: Sequence[PreparedSource], held_out: Sequence[PreparedSource]) -> list[str]:
    """Names of the classes of the training data, in the order of their numbers.

    Raises:
        ValueError: there is one only, or the held-out data have others.
    """
    names = class_names(label for source in train for label in source.column("label").unique().to_pylist())
    if len(names) < 2:
        raise ValueError(
            f"all labels of the training data are {names[0]!r}, so that there is nothing to tell apart: check that the "
            "labels are in the right field"
        )
    for source in held_out:
        for label in class_names(source.column("label").unique().to_pylist()):
            if label not in names:
                row = source.dataset[source.dataset["label"][:].index(label)]
                raise ValueError(
                    f"{row['place']}: the label {label!r} of held-out data is not in the training data, whose labels "
                    f"are {', '.join(names[:MOST_NAMED])}: give both the same labels"
                )
    return names


def _warnings(
    train: Sequence[PreparedSource], held_out: Sequence[PreparedSource], overlap: Mapping[str, int]
) -> Iterator[str]:
    for number, source in enumerate(train):
        for other in train[:number]:
            if other.digest == source.digest:
                yield f"warning: {other.name} and {source.name} hold the same examples, which count twice"
    for source in held_out:
        if overlap[source.name]:
            yield (
                f"warning: {overlap[source.name]} of {source.counts.examples} held-out examples of {source.name} are "
                "also trained on, so that its loss will look better than it is"
            )


@dataclass(frozen=True, kw_only=True)
class _FoundSource:
    """A source before it is read.

    Attributes:
        config: its settings.
        location: where its rows are.
        format: how they are written.
        as_chat: whether they are rendered in the chat template.
    """

    config: SourceConfig
    location: Location
    format: str
    as_chat: bool


def _check_alike(train: Sequence[_FoundSource], held_out: Sequence[_FoundSource]) -> None:
    """Held-out data are rendered as some of the training data are; plain text is rendered in no way."""
    trained = {source.as_chat for source in train if source.format != "text"}
    for source in held_out:
        if trained and source.format != "text" and source.as_chat not in trained:
            ways = ("as plain prompts", "in the chat template")
            raise ValueError(
                f"the held-out source {source.config.name} is rendered {ways[source.as_chat]}, but the training data "
                f"{ways[not source.as_chat]}: give both the same as_chat"
            )


def _check_chats_are_there(config: DataConfig, there: bool) -> None:
    """Settings that only conversations have would do nothing without one."""
    for name, given in (
        ("chat_template_kwargs", bool(config.chat_template_kwargs)),
        ("train_on_thoughts", not config.train_on_thoughts),
    ):
        if given and not there:
            raise ValueError(
                f"data.{name} is set, but no source is rendered in a chat template: set data.as_chat: true, or leave "
                "it out"
            )


def _unlike_what_is_served(train: Sequence[_FoundSource], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Servers put questions into the tokenizer's chat template."""
    plain = [str(s.config.name) for s in train if FORMATS[s.format].may_be_chat and not s.as_chat]
    if not plain or not tokenizer.chat_template:
        return []
    return [
        f"{', '.join(plain)}: trained as plain prompts, though the tokenizer has a chat template: ask the adapter with "
        "plain prompts (the completions of a server), or set data.as_chat: true"
    ]


def _find_sources(config: DataConfig, has_template: bool, formats: Sequence[str]) -> dict[str, list[_FoundSource]]:
    """All sources; rows that may be conversations are, where there is a chat template or other rows need one."""
    wanted = {"train": config.train_sources, "eval": config.eval_sources}
    placed = {part: [(s, *_find(s, config, formats)) for s in sources] for part, sources in wanted.items()}
    if config.eval_share is not None:
        placed = {
            part: [(s, _side_of(where, held_out, config, s, name), name) for s, where, name in placed["train"]]
            for part, held_out in (("train", False), ("eval", True))
        }
    default = has_template or any(FORMATS[name].is_chat for entries in placed.values() for _, _, name in entries)
    return {
        part: [
            _FoundSource(config=s, location=where, format=name, as_chat=_goes_into_chat(s, config, name, default))
            for s, where, name in entries
        ]
        for part, entries in placed.items()
    }


def _side_of(
    location: Location, held_out: bool, config: DataConfig, source: SourceConfig, row_format: str
) -> SplitLocation:
    assert config.eval_share is not None
    said = partial(
        what_is_said,
        row_format=row_format,
        fields=source.fields,
        prompt=config.prompt_of(source),
        ignore=source.ignore,
    )
    return SplitLocation(**vars(location), share=config.eval_share, held_out=held_out, said=said)


def _find(source: SourceConfig, config: DataConfig, formats: Sequence[str]) -> tuple[Location, str]:
    """Where a source is, and the format of its rows."""
    location = locate(
        source.path,
        subset=source.subset,
        split=source.split,
        revision=source.revision,
        limit=source.max_rows,
        columns=tuple(source.columns),
        quotes=source.quotes,
        text=source.text,
    )
    wanted: str = config.format if source.format == "auto" else source.format
    prompt = config.prompt_of(source)
    if prompt is not None:
        if wanted not in ("auto", "prompt_completion"):
            raise ValueError(
                f"{source.name} has a prompt of its own ({prompt!r}), but the format {wanted}: leave one of them out"
            )
        wanted = "prompt_completion"
    if wanted == "auto":
        _check_fields(source, formats)
        wanted = tell_format(first_rows(location), str(source.name), source.fields, formats)
    _check_fields(source, [wanted])
    _check_ignored(source, wanted, prompt)
    return location, wanted


def _goes_into_chat(source: SourceConfig, config: DataConfig, name: str, default: bool) -> bool:
    layout = FORMATS[name]
    if source.as_chat and not (layout.may_be_chat or layout.is_chat):
        chats = " and ".join(other for other, form in FORMATS.items() if form.may_be_chat)
        raise ValueError(f"as_chat is true for {source.name}, whose format is {name}, but it is for rows of {chats}")
    asked = config.as_chat if source.as_chat is None else source.as_chat
    as_chat = layout.is_chat or (layout.may_be_chat and (default if asked is None else asked))
    if not as_chat and config.system_of(source):
        way_out = "as_chat: true" if layout.may_be_chat else 'system: ""'
        raise ValueError(
            f"{source.name} has a system message, which {'plain prompts' if layout.may_be_chat else 'texts'} have no "
            f"place for: set {way_out} for this source"
        )
    return as_chat


def _check_fields(source: SourceConfig, formats: Sequence[str]) -> None:
    names = {layout: (*FORMATS[layout].required, *FORMATS[layout].optional) for layout in formats}
    known = {name for fields in names.values() for name in fields}
    for name in source.fields:
        if name not in known:
            listed = "; ".join(f"{layout}: {', '.join(fields)}" for layout, fields in names.items())
            raise ValueError(
                f"{name} in the fields of {source.name} is no field of a format{nearest(name, known)} ({listed}); "
                "write fields as (name of the format): (name in your rows)"
            )


def _check_ignored(source: SourceConfig, row_format: str, prompt: str | None) -> None:
    read = read_fields(row_format, source.fields, prompt)
    for name in source.ignore:
        for path in read:
            if name in (path, path.split(".")[0]):
                raise ValueError(
                    f"the ignore of {source.name} names {name!r}, which is read in rows of the format {row_format}: "
                    "leave it out of the ignore"
                )


def _prepare_all(
    config: DataConfig,
    found: Mapping[str, Sequence[_FoundSource]],
    tokenizer: PreTrainedTokenizerBase,
    template: ChosenTemplate | None,
) -> dict[str, list[PreparedSource]]:
    """All sources. Control tokens in the texts of several are told of together.

    Raises:
        ValueError: data that cannot be used.

    Returns:
        By part. A source of which a share is held out is missing where that share is empty.
    """
    prepared: dict[str, list[PreparedSource]] = {part: [] for part in found}
    flaws = []
    for part, entries in found.items():
        for entry in entries:
            try:
                prepared[part].append(_prepared(config, entry, tokenizer, template))
            except ControlTokensError as error:
                flaws.append(str(error))
            except NoExamplesError as error:
                if config.eval_share is None:
                    raise
                if part == "train":
                    raise ValueError(
                        f"{error} on the side that is trained on (data.eval is {config.eval}): lower the share, or "
                        "name held-out files"
                    ) from None
    if not flaws:
        return prepared
    advice = (
        "fix them, or set data.bad_rows to skip"
        if config.control_tokens == "text"
        else "fix them, set data.control_tokens to text to write these as plain text, or data.bad_rows to skip; "
        "prompts that are rendered already need data.as_chat: false"
    )
    raise ValueError("\n".join([*flaws, advice]))


def _prepared(
    config: DataConfig, found: _FoundSource, tokenizer: PreTrainedTokenizerBase, template: ChosenTemplate | None
) -> PreparedSource:
    source = found.config
    rules = EncodingRules(
        format=found.format,
        fields=source.fields,
        ignore=source.ignore,
        as_chat=found.as_chat,
        prompt=config.prompt_of(source),
        system=config.system_of(source),
        template=template.text if template is not None and found.as_chat else None,
        train_on=config.train_on,
        thoughts=config.train_on_thoughts,
        max_length=config.max_length,
        overlong=config.overlong,
        bad_rows=config.bad_rows,
        control_tokens=config.control_tokens,
        labels=config.labels,
        stride=config.stride,
        max_target_length=config.max_target_length,
    )
    workers = config.workers or min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    return prepare_source(
        str(source.name), found.location, rules, tokenizer, Path(config.cache_dir).expanduser(), workers
    )


def mixture_counts(config: DataConfig, sizes: Sequence[int]) -> list[int]:
    """Examples of each training source in one pass over the mixture, given how many of each take part."""
    sources = config.train_sources
    weights = [source.weight for source in sources if source.weight is not None]
    repeated = any(source.epochs is not None for source in sources)
    return pass_counts(
        sizes,
        weights=weights or None,
        epochs=[1.0 if source.epochs is None else source.epochs for source in sources] if repeated else None,
        temperature=config.temperature,
    )


def _members(config: DataConfig, sources: Sequence[PreparedSource], seed: int) -> list[np.ndarray]:
    """Of each training source, the indices in the whole data of the examples that take part."""
    members, first = [], 0
    for number, (source, settings) in enumerate(zip(sources, config.train_sources, strict=True)):
        size = source.counts.examples
        members.append(first + cap_examples(size, settings.max_examples, seed, number))
        first += size
    return members


def build_mixture(config: DataConfig, sources: Sequence[PreparedSource], seed: int, num_held_back: int = 0) -> Mixture:
    """The mixture that the configuration describes.

    Args:
        config: the configuration's section ``data``.
        sources: the training sources.
        seed: seed of the run.
        num_held_back: examples that are not trained on (``pruning.num_held_back``).

    Raises:
        ValueError: these are all examples of a source.
    """
    members = _members(config, sources, seed)
    members, held_back = hold_back(members, num_held_back, seed) if num_held_back else (members, np.arange(0))
    return Mixture(
        members=members,
        counts=mixture_counts(config, [len(indices) for indices in members]),
        lengths=np.concatenate([source.lengths() for source in sources]),
        batching=config.batching,
        max_length=config.max_length,
        seed=seed,
        held_back=held_back,
    )


def describe_data(data: RunData, mixture: Mixture) -> dict[str, Any]:
    """What a run's record says about its data."""
    trained = [{**_describe(source), "per_epoch": n} for source, n in zip(data.train, mixture.counts, strict=True)]
    held_out = [{**_describe(source), "also_trained_on": data.overlap[source.name]} for source in data.evaluation]
    return {
        "chat": data.template is not None,
        "train": trained,
        "eval": held_out,
        "batching": mixture.batching,
        **({"held_back": len(mixture.held_back)} if len(mixture.held_back) else {}),
        **({} if data.labels is None else {"labels": data.labels}),
    }


def _describe(source: PreparedSource) -> dict[str, Any]:
    return {"name": source.name, "format": source.format, "digest": source.digest, **asdict(source.counts)}
