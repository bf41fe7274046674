"""Loading the frozen base model and its tokenizer."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

import torch
import transformers
from huggingface_hub import snapshot_download
from packaging.version import Version
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from dora_dist.base_model.head import belongs_to, head_modules, start_parameters
from dora_dist.base_model.layer_by_layer import LayersTaken, TakeLayer
from dora_dist.base_model.lean_loading import check_loaded, find_mismatches, lean_loading, listed
from dora_dist.base_model.new_tokens import NewTokens, add_tokens
from dora_dist.base_model.quantization import (
    forbid_inference_packing,
    prepare_stored,
    quantization_config,
    stored_quantization,
)
from dora_dist.config.format_version import ADAPTER_CONFIG
from dora_dist.config.model import ORIGINAL_POSITIONS, ModelConfig
from dora_dist.config.tasks import CAUSAL_LM, TASKS

FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.py", "LICENSE*", "NOTICE*"]
"""Files of a model on the Hub that :func:`local_folder` fetches."""
SAMPLES, SAMPLE_BYTES = 16, 4096
"""Number of pieces, and bytes of each, that are read of a file of weights to identify it."""


def find_model(path: str) -> str:
    """The model that a configuration names: a folder (``~`` expanded), or a name on the Hub as it is.

    Raises:
        ValueError: ``path`` looks like a local path, but holds no ``config.json``.
    """
    local = path.startswith((".", "/", "~")) or os.path.isdir(path)
    if local and not (Path(path).expanduser() / "config.json").is_file():
        _refuse_adapter(path)
        raise ValueError(
            f"model.path {path!r} holds no config.json: point it to a folder in the Hugging Face layout, or give the "
            "name of a model on the Hub"
        )
    return str(Path(path).expanduser()) if local else path


def local_folder(path: str) -> Path:
    """The folder of a model with all its files, which are fetched if the model is on the Hub.

    Raises:
        ValueError: the path is not usable.
    """
    found = find_model(path)
    if Path(found).is_dir():
        return Path(found)
    with _reading(path):
        return Path(snapshot_download(found, allow_patterns=FETCHED))


def _refuse_adapter(path: str) -> None:
    """Refuse an adapter given as a model, and name its base."""
    settings = Path(path).expanduser() / ADAPTER_CONFIG
    if settings.is_file():
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
        raise ValueError(
            f"model.path {path!r} holds an adapter and no model{f'; its base is {base}' if base else ''}: set "
            "model.path to the base, or export the adapter merged into it and give that folder"
        )


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Turn a failure to find or read a model into an error that names the key to mend.

    Raises:
        ValueError: the path cannot be read (transformers raises ``OSError``, also for a name that is not on the Hub),
            or a file of weights or their index is cut off.
    """
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"model.path {path!r} cannot be read, neither as a folder (looked from {Path.cwd()}) nor from the Hub: "
            f"{error}"
        ) from None
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"the weights at model.path {path!r} cannot be read: {error}; copy or download the model again"
        ) from None


@contextmanager
def _putting_together(path: str, stored: bool) -> Iterator[None]:
    """Turn a failure to put stored 4-bit weights and their constants together into an error that says so.

    Raises:
        ValueError: transformers has raised ``RuntimeError`` for them.
    """
    try:
        yield
    except RuntimeError as error:
        if not stored:
            raise
        raise ValueError(
            f"the 4-bit weights at model.path {path!r} cannot be put together: constants of some are missing or "
            f"damaged ({str(error).partition(chr(10))[0]}); copy or download the model again"
        ) from None


def resolve_compute_dtype(name: str) -> torch.dtype:
    """The dtype with this name; ``auto`` is bfloat16 on a GPU that has it, otherwise float32 (bfloat16 is far slower on
    most CPUs)."""
    if name == "auto":
        native = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _no_tokenizer(path: str, reason: str) -> ValueError:
    return ValueError(
        f"model.path {path!r} holds no tokenizer that can be read ({reason}): put the model's tokenizer files "
        "(tokenizer.json, tokenizer_config.json) beside its weights"
    )


def load_tokenizer(path: str, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer, with a padding token (the end-of-sequence token if it has none of its own).

    Raises:
        ValueError: the path is not usable, or holds no tokenizer.
    """
    with _reading(path):
        try:
            tokenizer = AutoTokenizer.from_pretrained(os.path.expanduser(path), trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise _no_tokenizer(path, str(error).partition(chr(10))[0]) from None
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made of nothing, without its files
        raise _no_tokenizer(path, "it knows no token but special ones")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_new_tokens(spec: "BaseModelSpec", texts: Sequence[str]) -> NewTokens:
    """New tokens for the tokenizer of a base. The tokenizer is read anew, so that it still splits their texts.

    Raises:
        ValueError: as in :func:`load_tokenizer` and :func:`~dora_dist.base_model.new_tokens.add_tokens`.
    """
    return add_tokens(load_tokenizer(spec.path, spec.trust_remote_code), texts)


@dataclass(frozen=True, kw_only=True)
class BaseModelSpec:
    """The base model to read, and how to read it.

    Attributes:
        path: folder in the Hugging Face layout, or a name on the Hub.
        task: one of :data:`~dora_dist.config.tasks.TASKS`; decides the model class.
        quantization: ``nf4``, ``int8`` or ``none``; the head is never quantized.
        compute_dtype: dtype of activations and of all weights that are not quantized.
        attention: transformers' attention implementation; ``None`` for the model's default.
        trust_remote_code: whether to run code that comes with the model.
        rope_scaling: scaling of the rotary positions, checked (:func:`~dora_dist.config.model.check_rope`); None for
            the model's own.
    """

    path: str
    task: str = CAUSAL_LM
    quantization: str = "nf4"
    compute_dtype: torch.dtype = torch.float32
    attention: str | None = None
    trust_remote_code: bool = False
    rope_scaling: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: ModelConfig, task: str) -> Self:
        """The base of a run, with ``compute_dtype`` resolved for this machine."""
        return cls(
            path=model.path,
            task=task,
            quantization=model.quantization,
            compute_dtype=resolve_compute_dtype(model.compute_dtype),
            attention=model.attention,
            trust_remote_code=model.trust_remote_code,
            rope_scaling=model.rope_scaling,
        )

    @property
    def auto_class(self) -> Any:
        """transformers' class that loads a model for the task."""
        return getattr(transformers, TASKS[self.task].auto_class)


def load_model_config(spec: BaseModelSpec) -> PreTrainedConfig:
    """transformers' configuration of the model, with the rotary positions of ``spec`` and, if the model is stored in
    4 bits, the compute dtype of ``spec``.

    Raises:
        ValueError: the path is not usable, or the model is stored quantized in another way than ``spec`` says.
    """
    with _reading(spec.path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            find_model(spec.path), trust_remote_code=spec.trust_remote_code
        )
    if spec.rope_scaling is not None:
        scale_rope(config, spec.rope_scaling, spec.path)
    stored = stored_quantization(config, spec.path)
    if stored is None:
        return config
    if spec.quantization != "nf4":
        raise ValueError(
            f"model.quantization is {spec.quantization}, but the model at model.path {spec.path!r} is stored in NF4, "
            "and is read as it is: set model.quantization to nf4, or give the model in 16 bits"
        )
    stored.bnb_4bit_compute_dtype = spec.compute_dtype
    config.quantization_config = stored.to_dict()
    return config


def identity_of_weights(path: str) -> str | None:
    """Identifies the weights in a folder, wherever it lies, without reading all of them: by names and sizes of their
    files, and by samples of their bytes.

    Args:
        path: see :class:`BaseModelSpec`.

    Returns:
        Number of files, and 16 hexadecimal digits. None where there are no weights yet, and for a model on the Hub,
        whose commit changes with every line of its card.
    """
    folder = Path(find_model(path))
    if not folder.is_dir():
        return None
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        return None
    digest = sha256()
    with _reading(path):
        for file in files:
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            digest.update(_samples(file))
    return f"{len(files)} files, {digest.hexdigest()[:16]}"


def _samples(file: Path) -> bytes:
    """Pieces of a file at equal distances, from its first bytes to its last."""
    last = max(0, file.stat().st_size - SAMPLE_BYTES)
    with file.open("rb") as opened:
        found = []
        for number in range(SAMPLES + 1):
            opened.seek(last * number // SAMPLES)
            found.append(opened.read(SAMPLE_BYTES))
    return b"".join(found)


def scale_rope(config: PreTrainedConfig, scaling: Mapping[str, Any], path: str) -> None:
    """Scale the rotary positions in a model's configuration, and set its number of positions to match, in place.

    Raises:
        ValueError: the model has no rotary positions, has different ones by kind of layer, or would get fewer positions
            than it has.
    """
    text = config.get_text_config()
    present = getattr(text, "rope_parameters", None) or {}
    if "rope_theta" not in present:
        raise ValueError(
            f"model.rope_scaling is given, but the model at model.path {path!r} has no rotary positions that are the "
            "same in all layers (rope_parameters of its config.json): leave it out"
        )
    original = scaling.get(ORIGINAL_POSITIONS, present.get(ORIGINAL_POSITIONS))
    original = int(original or text.max_position_embeddings)
    before, after = text.max_position_embeddings, int(original * scaling["factor"])
    if after < before:
        raise ValueError(
            f"model.rope_scaling has the factor {scaling['factor']}, of {original} original positions, which makes "
            f"{after}; the model at model.path {path!r} has {before} already: set a factor of more than "
            f"{before / original:g}, or leave it out"
        )
    parameters = {"rope_theta": present["rope_theta"], **scaling}
    if scaling["rope_type"] != "linear":  # it does not use this key, and transformers would warn
        parameters[ORIGINAL_POSITIONS] = original
    else:
        parameters.pop(ORIGINAL_POSITIONS, None)
    text.max_position_embeddings = after
    text.rope_parameters = parameters
    text.validate_rope()


def scaled_positions(spec: BaseModelSpec) -> dict[str, Any] | None:
    """Entries that give the ``config.json`` of a model the positions of ``spec``; None if these are the model's own.

    Raises:
        ValueError: as in :func:`load_model_config`.
    """
    if spec.rope_scaling is None:
        return None
    text = load_model_config(spec).get_text_config()
    return {"rope_parameters": dict(text.rope_parameters), "max_position_embeddings": text.max_position_embeddings}


def load_skeleton(spec: BaseModelSpec) -> PreTrainedModel:
    """The model without weights (on the meta device): enough to find its layers, at no cost.

    Raises:
        ValueError: the path is not usable, or the architecture has no model for the task.
    """
    return _skeleton(spec, load_model_config(spec))


def check_attention(spec: BaseModelSpec, skeleton: PreTrainedModel) -> None:
    """Refuse an attention implementation that this machine or the model does not have.

    Raises:
        ValueError: one of them does not have it.
    """
    if spec.attention is None:
        return
    try:
        skeleton.set_attn_implementation(spec.attention)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"model.attention is {spec.attention!r}, which cannot be used here: {str(error).partition(chr(10))[0]} "
            "Install it, or set model.attention to sdpa or eager"
        ) from None


def _skeleton(spec: BaseModelSpec, config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        try:
            skeleton: PreTrainedModel = spec.auto_class.from_config(config, trust_remote_code=spec.trust_remote_code)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise ValueError(
                f"the model at model.path {spec.path!r} is a {config.model_type}, for which transformers has no "
                f"{spec.auto_class.__name__}: task is {spec.task}; take a model that can do it"
            ) from None
    return skeleton


def make_plain_model(spec: BaseModelSpec) -> PreTrainedModel:
    """The model without quantization, in float32, with arbitrary weights that are to be overwritten.

    Raises:
        ValueError: as in :func:`load_skeleton`.
    """
    config = load_model_config(spec)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with no_init_weights():
        plain: PreTrainedModel = spec.auto_class.from_config(
            config, dtype=torch.float32, trust_remote_code=spec.trust_remote_code
        )
    plain.tie_weights()
    return plain


@dataclass(frozen=True, kw_only=True)
class HeadStart:
    """Outputs and seed of a head that is trained beside the adapter.

    Attributes:
        labels: names of the classes in the order of their numbers; None if the outputs are no classes.
        num_outputs: number of outputs without classes: 1 for a number, 2 for start and end of an answer.
        seed: seed of the values that the model's files do not have.
    """

    labels: Sequence[str] | None = None
    num_outputs: int = 1
    seed: int = 0

    def configure(self, config: PreTrainedConfig) -> None:
        """Write the number and the names of the outputs into the model's configuration."""
        if self.labels is None:
            config.num_labels = self.num_outputs
            config.problem_type = "regression" if self.num_outputs == 1 else None
        else:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {name: number for number, name in enumerate(self.labels)}
            config.problem_type = "single_label_classification"


def load_base_model(
    spec: BaseModelSpec,
    device: torch.device | str = "cpu",
    head: HeadStart | None = None,
    take_layer: TakeLayer | None = None,
) -> PreTrainedModel:
    """The frozen model for a task, on one device. It is quantized tensor by tensor while it is read, or keeps the
    4 bits that it is stored in.

    Weights of its head that its files do not have, or have for another number of classes, start anew.

    Args:
        spec: the model to read, and how.
        device: device of the model.
        head: outputs and seed of the head, for a task that trains one.
        take_layer: function called with each layer when it has been read and quantized, before the next one is read;
            where ranks shard the base, it leaves this rank's shard. None if every rank holds the whole base.

    Raises:
        ValueError: the path or the quantization is not usable, or the weights are not those that the model needs.
    """
    config = load_model_config(spec)
    heads: list[str] = []
    if head is not None:
        head.configure(config)
        heads = head_modules(_skeleton(spec, config))
    stored = getattr(config, "quantization_config", None) is not None
    prepare = partial(prepare_stored, path=spec.path, dtype=spec.compute_dtype) if stored else None
    layers = None if take_layer is None else LayersTaken(take_layer, prepare)
    model, loading_info = _read_weights(spec, config, device, heads, layers)
    wanting = [*loading_info["missing_keys"], *(name for name, *_ in loading_info["mismatched_keys"])]
    fresh = {name for name in wanting if belongs_to(name, heads)}
    check_loaded(model, spec.path, loading_info, fresh)
    if head is not None:
        start_parameters(model, fresh, head.seed)
    forbid_inference_packing(model)
    model.config.use_cache = False
    model.requires_grad_(False)
    if layers is not None:
        layers.take_the_rest(model)
    return model


def _read_weights(
    spec: BaseModelSpec,
    config: PreTrainedConfig,
    device: torch.device | str,
    heads: Sequence[str],
    layers: LayersTaken | None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model, ``heads`` left unquantized, and what ``from_pretrained`` says of missing and mismatched weights."""
    dtype = spec.compute_dtype
    stored = getattr(config, "quantization_config", None)
    if stored is not None and heads:
        stored["llm_int8_skip_modules"] = [*(stored["llm_int8_skip_modules"] or []), *heads]
    unchanged = layers is None and (stored is not None or (spec.quantization == "none" and config.dtype == dtype))
    by_layer = nullcontext() if layers is None else layers.while_loading()
    with (
        _reading(spec.path),
        _putting_together(spec.path, stored is not None),
        by_layer,
        lean_loading(torch.device(device), shared=unchanged) as not_finite,
    ):
        loaded: tuple[PreTrainedModel, dict[str, Any]] = spec.auto_class.from_pretrained(
            find_model(spec.path),
            config=config,
            quantization_config=None if stored else quantization_config(spec.quantization, dtype, heads),
            dtype=dtype,
            device_map={"": device},
            attn_implementation=spec.attention,
            trust_remote_code=spec.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # check_loaded reports them better
        )
    if not_finite:
        raise ValueError(
            f"the model at model.path {spec.path!r} has values that are not finite (NaN or infinite) in "
            f"{listed(sorted(not_finite))}: copy or download the model again"
        )
    if stored is not None:
        prepare_stored(loaded[0], spec.path, dtype)
    if spec.quantization != "none" and Version(transformers.__version__) < Version("5.23"):
        model, loading_info = loaded
        find_mismatches(model, _skeleton(spec, config), loading_info)
    return loaded
