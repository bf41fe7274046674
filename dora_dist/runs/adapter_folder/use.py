"""The settings that an adapter needs to be used as it was trained: kept in its folder, wherever that is copied to."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

from dora_dist.base_model.load import resolve_compute_dtype
from dora_dist.config.run import RunConfig
from dora_dist.console import files
from dora_dist.runs import records
from dora_dist.runs.fingerprint import Fingerprint

USE = "dora_dist.json"
"""Name of the file beside an adapter's weights."""
FORMAT = 2
"""Incremented by changes after which older files mean something else or cannot be read. Format 1 has neither
``fields`` nor ``ignore``."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Use:
    """The settings of a run that its adapter depends on when it is used. All values are plain JSON.

    Attributes:
        task: the run's task.
        quantization: quantization of the base.
        compute_dtype: dtype in which the base was read before it was quantized, such as ``float32``; never ``auto``.
        rope_scaling: setting of the base's rotary positions; None for the base's own.
        new_tokens: texts of the tokens that the run has added; None where it has added none.
        chat: whether the adapter was trained on conversations, in the chat template saved with the tokenizer.
        formats: row formats of the training data.
        prompts: the ``data.prompt`` of each of its sources; None stands for sources without one.
        fields: the distinct ``fields`` of its sources: a format's name of a field -> the name in the rows.
        ignore: the distinct lists of fields of rows that its sources pass over.
        systems: the system messages that its sources add to conversations without one.
        control_tokens: treatment of control tokens in texts.
        max_new_tokens: length limit of an answer in tokens.
    """

    task: str
    quantization: str
    compute_dtype: str
    rope_scaling: Mapping[str, Any] | None
    new_tokens: list[str] | None
    chat: bool
    formats: list[str]
    prompts: list[str | None]
    fields: list[dict[str, str]]
    ignore: list[list[str]]
    systems: list[str]
    control_tokens: str
    max_new_tokens: int

    @classmethod
    def of(cls, config: RunConfig, run: Path) -> Self:
        """The settings of the run with this configuration, from what it has recorded in its folder."""
        dtype = str(resolve_compute_dtype(config.model.compute_dtype))
        data: dict[str, Any] = {}
        if (run / records.RUN).is_file():
            recorded = files.read_json(run / records.RUN)
            data = recorded.get("data", {})
            # `auto` was resolved on the machine of the run.
            dtype = Fingerprint.from_dict(recorded["settings"], run / records.RUN).model["compute_dtype"]
        sources = config.data.train_sources
        return cls(
            task=config.task,
            quantization=config.model.quantization,
            compute_dtype=dtype.removeprefix("torch."),
            rope_scaling=config.model.rope_scaling,
            new_tokens=config.adapter.new_tokens,
            chat=data.get("chat", False),
            formats=sorted({source["format"] for source in data.get("train", [])} or {config.data.format}),
            prompts=list(dict.fromkeys(map(config.data.prompt_of, sources))),
            fields=_distinct(source.fields for source in sources),
            ignore=_distinct(sorted(source.ignore) for source in sources),
            systems=sorted(set(map(config.data.system_of, sources))),
            control_tokens=config.data.control_tokens,
            max_new_tokens=config.evaluation.max_new_tokens,
        )

    def write(self, adapter: Path) -> None:
        """Write the settings into an adapter's folder."""
        files.write_json(adapter / USE, {"format": FORMAT, **asdict(self)})

    @classmethod
    def read(cls, adapter: Path) -> Self | None:
        """The settings in an adapter's folder; None where there are none.

        Raises:
            ValueError: a later version wrote it, or it is damaged.
        """
        path = adapter / USE
        if not path.is_file():
            return None
        try:
            said = files.read_json(path)
            version = said.pop("format")
            if version == 1:
                said |= {"fields": [{}], "ignore": [[]]}
            if version in (1, FORMAT):
                return cls(**said)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path} cannot be read: {error}; copy the adapter's folder again") from None
        raise ValueError(
            f"{path} has format {version}, but this version of dora-dist reads format {FORMAT}: a later version wrote "
            "it. Update dora-dist"
        )


def _distinct(values: Iterable[T]) -> list[T]:
    """Each of some values once."""
    found: list[T] = []
    for value in values:
        if value not in found:
            found.append(value)
    return found
