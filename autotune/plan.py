"""The plan: the chosen configuration as a file that says everything and measures nothing.

Keyed by checkpoint tensor path; every quantizable tensor is listed, kept ones with the reason. The same tables, seed
and number of trials give the same bytes, so there are no timestamps and no measurement of the plan itself: those
belong to the report. `plan.schema.json` is this model's JSON Schema, committed and compared in a test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from autotune.errors import InputError, did_you_mean
from autotune.search_space.schemes import scheme
from autotune.store import canonical_json, digest, parse_json, read_json, write_text

SCHEMA_VERSION = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def _shortened(model: BaseModel, values: dict[str, Any]) -> dict[str, Any]:
    """Without what has its default."""
    later = {name: field.default for name, field in type(model).model_fields.items() if not field.is_required()}
    return {name: value for name, value in values.items() if name not in later or value != later[name]}


class ModelRef(_Strict):
    name: str
    architecture: str
    task: Literal["causal-lm", "encoder"]
    dtype: str
    sha256: str | None  # None: made from a bare config.json, applies to no weights
    tied_embeddings: bool


class SchemeSpec(_Strict):
    """One entry of the plan's scheme table, self-contained. The last four say what most formats leave at its default;
    they are written where a scheme does not, so that plans made before they were known keep their digest."""

    sparsity: Literal["dense", "2:4", "4:8", "50%"]
    weight_kind: Literal["int", "float", "nf"]
    weight_bits: int
    weight_group_size: int | None
    activation_kind: Literal["int", "float", "nf"] | None
    activation_bits: int | None
    bits_per_weight: float
    weight_rows: int | None = Field(default=1, description="output channels that share a scale; None: all")
    weight_symmetric: bool = True
    weight_scale: Literal["bf16", "e8m0", "e4m3"] = "bf16"
    activation_group_size: int | None = None

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _shortened(self, write(self))

    @classmethod
    def of(cls, name: str) -> SchemeSpec:
        item = scheme(name)
        return cls(
            sparsity=item.sparsity,
            weight_kind=item.weight.kind,
            weight_bits=item.weight.bits,
            weight_group_size=item.weight.group_size,
            activation_kind=item.activation.kind if item.activation else None,
            activation_bits=item.activation.bits if item.activation else None,
            bits_per_weight=item.bits_per_weight,
            weight_rows=item.weight.rows,
            weight_symmetric=item.weight.symmetric,
            weight_scale=item.weight.scale,
            activation_group_size=item.activation.group_size if item.activation else None,
        )


class TensorEntry(_Strict):
    """One quantizable tensor. `scheme` None: kept dense, with the reason."""

    tensor: str
    module: str
    shape: tuple[int, int]  # (out_features, in_features)
    group: str
    scheme: str | None
    reason: str


class GroupEntry(_Strict):
    """One layer group: tensors that share a decision and run as one kernel call, or one an expert. The last three are
    written where there are experts, so that other plans keep their digest."""

    name: str
    role: str
    layer: int | None
    kernel: str
    predicted_latency_us: float
    latency_status: Literal["measured", "estimated"]
    predicted_loss_nats: float | None
    weight_bytes: int
    experts: int = Field(default=1, description="tensors are those of each expert in turn, equally many an expert")
    experts_per_token: int = 1
    experts_hardly_reached: int = Field(default=0, description="compressed for all tokens of their layer")

    @model_serializer(mode="wrap")
    def _without_defaults(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return _shortened(self, write(self))


class KeptEntry(_Strict):
    tensor: str
    shape: tuple[int, ...]
    reason: str


class Prediction(_Strict):
    latency_us: float  # of the workload, end to end
    dense_latency_us: float
    loss_nats: float | None  # sum of the loss table's entries (KL)
    search_kl_nats: float | None  # measured on the search documents
    weight_bytes: int
    dense_weight_bytes: int


class Limits(_Strict):
    max_loss: float | None  # relative rise of perplexity, or relative squared error for encoders
    max_memory_bytes: int | None
    min_speedup: float | None


class Provenance(_Strict):
    """Hashes of everything the plan was computed from."""

    latency_table: str
    loss_table: str | None
    documents: str | None
    kernels: dict[str, str]
    packages: dict[str, str]
    seed: int
    trials: int


class KVCache(_Strict):
    """Where the KV cache was a choice: what became of it. Bytes are of the workload's largest request."""

    reason: str
    cache_bytes: int
    dense_cache_bytes: int
    loss_nats: float | None  # measured KL of the format alone
    formats: tuple[str, ...] = Field(description="that were searched beside the model's own dtype")


class Recovery(_Strict):
    """Training after compression: groups whose codes are not those of the database but what trained weights round to.
    Their predicted losses are empty, because the loss table is of the codes before."""

    method: str
    groups: tuple[str, ...]
    tokens: int
    steps: int
    seed: int
    data: str  # what was trained on
    data_digest: str  # of its tokens
    weights: str  # sha256 over the codes of the groups, in their order


class SmoothedInputs(_Strict):
    """A group whose inputs are divided by powers of two where they are made: in a norm, or a layer's rows. The
    exponents are in the saved model."""

    group: str
    source: str
    heads: int = Field(default=1, description="key heads, where the source is their value projection")
    repeat: int = Field(default=1, description="query heads a key head")


class Smoothing(_Strict):
    sites: tuple[SmoothedInputs, ...]
    exponents: str  # sha256 over those of all sites, in their order


class Recompression(_Strict):
    """Compression once more, for the inputs that groups get in this configuration: groups whose codes are not those of
    the database. Predicted losses are of the codes before; `search_kl_nats` is of these."""

    method: str
    groups: tuple[str, ...]
    weights: str  # sha256 over the codes of the groups, in their order


class Plan(_Strict):
    schema_version: int = SCHEMA_VERSION
    generator: str
    model: ModelRef
    target: str
    runtime: str
    workload: str
    budget: Limits
    schemes: dict[str, SchemeSpec]
    groups: tuple[GroupEntry, ...]
    tensors: tuple[TensorEntry, ...]
    kept: tuple[KeptEntry, ...]
    kv_cache: Literal["int8", "fp8"] | None = Field(default=None, description="None: the model's own dtype")
    prediction: Prediction
    provenance: Provenance
    recovery: Recovery | None = Field(default=None, description="None: compressed only, and then not written")
    smoothing: Smoothing | None = Field(default=None, description="None: nothing was scaled; not written")
    recompression: Recompression | None = Field(default=None, description="None: as the database has it; not written")
    cache: KVCache | None = Field(default=None, description="None: the cache was no choice, and then not written")

    @model_serializer(mode="wrap")
    def _without_what_was_not_done(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = write(self)
        for name in ("recovery", "smoothing", "recompression", "cache"):
            if values[name] is None:  # plans made before it was known keep their digest
                del values[name]
        return values

    @property
    def configuration(self) -> dict[str, str]:
        """Group name -> scheme name, dense groups included."""
        chosen = {entry.group: entry.scheme for entry in self.tensors}
        return {group: name or self.model.dtype for group, name in chosen.items()}

    @property
    def kernels(self) -> dict[str, str]:
        """Group name -> kernel name."""
        return {group.name: group.kernel for group in self.groups}

    @property
    def estimated(self) -> bool:
        return any(group.latency_status == "estimated" for group in self.groups)

    def digest(self) -> str:
        return digest(self.model_dump(mode="json"))

    def save(self, path: Path) -> None:
        """Canonical JSON with its own sha256 beside the content, so that an edit is noticed."""
        write_text(path, canonical_json({"plan": self.model_dump(mode="json"), "sha256": self.digest()}) + "\n")

    @classmethod
    def load(cls, path: Path | str) -> Plan:
        """Raises InputError `plan.missing`, `plan.syntax`, `plan.schema`, `plan.version`, `plan.edited`."""
        return cls.from_json(read_json(Path(path), "plan"), str(path))

    @classmethod
    def loads(cls, text: str) -> Plan:
        return cls.from_json(parse_json(text, "plan", "plan"), "plan")

    @classmethod
    def from_json(cls, value: Any, where: str) -> Plan:
        if not isinstance(value, dict) or set(value) != {"plan", "sha256"} or not isinstance(value["plan"], dict):
            raise InputError("plan.schema", f"{where} is not a plan file.", "Make one with `autotune tune`.")
        version = value["plan"].get("schema_version")
        if version != SCHEMA_VERSION:
            hint = "Use the autotune version that wrote it, or search again."
            raise InputError("plan.version", f"{where} has schema version {version}, this is {SCHEMA_VERSION}.", hint)
        try:
            plan = cls.model_validate(value["plan"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            raise InputError("plan.schema", f"{where}: {place}: {first['msg']}.", _hint(place)) from error
        if plan.digest() != value["sha256"]:
            hint = "Edit nothing by hand: `autotune plan choose` writes other points of the same search."
            raise InputError("plan.edited", f"{where} does not match its own sha256.", hint)
        plan._check(where)
        return plan

    def _check(self, where: str) -> None:
        groups = {group.name for group in self.groups}
        for entry in self.tensors:
            if entry.scheme is not None and entry.scheme not in self.schemes:
                raise InputError("plan.schema", f"{where}: {entry.tensor} uses unlisted scheme {entry.scheme!r}.")
            if entry.group not in groups:
                raise InputError("plan.schema", f"{where}: {entry.tensor} is in unlisted group {entry.group!r}.")
        for mixed in (group for group in self.groups if group.experts != 1):
            count = sum(entry.group == mixed.name for entry in self.tensors)
            if mixed.experts < 1 or count % mixed.experts:
                what = f"{count} tensors of {mixed.name} are not those of {mixed.experts} experts"
                raise InputError("plan.schema", f"{where}: {what}.")
        for group in groups:
            if len({entry.scheme for entry in self.tensors if entry.group == group}) > 1:
                raise InputError("plan.schema", f"{where}: the tensors of {group} have different schemes.")

    def check_model(self, sha256: str | None, shapes: dict[str, tuple[int, int]]) -> None:
        """Refuse another model: raises InputError `plan.model_mismatch` naming the first difference."""
        if self.model.sha256 is not None and self.model.sha256 == sha256:
            return
        difference = "the weights differ"
        for entry in self.tensors:
            shape = shapes.get(entry.tensor)
            if shape != entry.shape:
                difference = f"first difference: {entry.tensor} is {shape or 'absent'}, the plan says {entry.shape}"
                break
        raise InputError(
            "plan.model_mismatch",
            f"the plan was made for model {_short(self.model.sha256)} ({self.model.name}), "
            f"this one is {_short(sha256)}; {difference}.",
            "Search again, or open the model the plan names.",
        )


def _short(sha256: str | None) -> str:
    return sha256[:12] if sha256 else "without weights"


def _hint(place: str) -> str:
    return did_you_mean(place.rpartition(".")[2], Plan.model_fields)
