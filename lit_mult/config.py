"""The config of a run: a frozen, validated tree of settings, and the only place with defaults."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.config import JsonDict

from lit_mult.errors import ConfigError, did_you_mean
from lit_mult.numbers import Number
from lit_mult.registry import fault_of, modules_in
from lit_mult.registry.contracts import OptimizerSettings
from lit_mult.registry.kinds import KINDS
from lit_mult.registry.optimizers import OPTIMIZERS, check_known, is_imported, trained_by
from lit_mult.registry.roles import Role, Shape

WidthRule = Literal["lr", "lr_wd", "lr_sqrt_wd", "multiplier"]
DepthRule = Literal["none", "depth_mup", "completep", "hyperp"]
Tier = Literal["NONE", "LR", "LRWD", "FULL"]
NormKind = Literal["vector", "scalar", "frozen"]
if TYPE_CHECKING:
    MultiplierKind = str
    Diagnostic = str
    Experiment = str
else:
    MultiplierKind = Literal[tuple(KINDS)]
    Diagnostic = Literal[modules_in("diagnostics/groups")]
    Experiment = Literal[modules_in("analysis/experiments")]


def _choices(registry: Mapping[str, Any]) -> str:
    return "; ".join(f"{name}: {entry.help}" for name, entry in registry.items())


_IMPORTED = (
    "; import:MODULE.CLASS: an optimizer of an installed library for the hidden matrices, AdamW for the rest, with "
    "optim.extra as further arguments"
)


# Values of `json_schema_extra` for fields that config hashes do not always include.
NEVER_HASHED: Final[JsonDict] = {"hashed": "never"}
"""For fields that never change a loss: display, files to keep, paths."""
HASHED_UNLESS_DEFAULT: Final[JsonDict] = {"hashed": "unless default"}
"""For fields added later, so that existing hashes stay valid. Every new field has one of the two."""


# Mappings with arbitrary keys.
OPEN_FIELDS = (
    "placement.overrides",
    "optim.extra",
    "trainer.extra",
    "parametrization.forward",
    "parametrization.lr",
    "parametrization.weight_decay",
)


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


class ModelConfig(_Section):
    """A Llama-style decoder. Width changes the number of heads, never the size of a head."""

    d_model: int = Field(64, gt=0)
    """Width of the residual stream; a multiple of head_dim."""
    n_layers: int = Field(4, gt=0)
    """Number of decoder blocks."""
    head_dim: int = Field(32, gt=0)
    """Size of one attention head; even, for the rotary embedding."""
    num_key_value_groups: int = Field(1, gt=0)
    """Query heads that share one key/value head (1: multi-head attention, more: grouped-query attention)."""
    mlp_ratio: Number = Field(2.75, gt=0)
    """Hidden size of the gated MLP over d_model; the product must be whole."""
    rope_theta: Number = Field(10_000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: Number = Field(1e-5, gt=0)
    """Epsilon of RMSNorm."""
    block_norms: Literal["learned", "frozen"] = Field("learned", json_schema_extra=HASHED_UNLESS_DEFAULT)
    """RMSNorm weights of the blocks: learned, or fixed at 1."""
    qk_norm: bool = Field(False, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """RMSNorm of every query and key over head_dim, before the rotary embedding (as in Qwen3), with one weight for all
    query heads and one for all key heads, learned or fixed as block_norms. It removes the scale of a head's rows."""
    final_norm: NormKind = Field("vector", json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Weight of the last RMSNorm (paper fig. 1, VPN / SPN / FPN): one a channel, one learned scalar, or fixed at 1."""
    tie_embeddings: bool = False
    """Let the LM head use the embedding's matrix, and so its lr and weight decay, but not its multipliers."""
    dropout: Number = Field(0.0, ge=0, lt=1)
    """Dropout probability on the output of each residual branch."""
    z_loss: Number = Field(0.0, ge=0)
    """Weight of logsumexp(logits)^2 in the training loss; reported losses leave it out (paper: 1e-4)."""
    pretrained: str | None = Field(None, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """FOLDER@HASH: a Hugging Face Llama or Qwen3 whose effective matrices and norms the run starts from, and the hash
    of its content, which the command line adds; `lit-mult import` writes the other fields to fit. null: a random
    start."""

    @property
    def n_heads(self) -> int:
        return self.d_model // self.head_dim

    @property
    def n_kv_heads(self) -> int:
        return self.n_heads // self.num_key_value_groups

    @property
    def d_ff(self) -> int:
        return round(self.d_model * self.mlp_ratio)

    @property
    def block_norm_kind(self) -> NormKind:
        return "vector" if self.block_norms == "learned" else "frozen"

    def matrix_shapes(self, vocab_size: int) -> dict[Role, Shape]:
        """Shape (d_out, d_in) of the matrix of every role; the embedding is (vocabulary, d_model)."""
        d, kv, hidden = self.d_model, self.n_kv_heads * self.head_dim, self.d_ff
        return {
            Role.EMBEDDING: (vocab_size, d),
            Role.Q_PROJ: (d, d),
            Role.K_PROJ: (kv, d),
            Role.V_PROJ: (kv, d),
            Role.O_PROJ: (d, d),
            Role.GATE_PROJ: (hidden, d),
            Role.UP_PROJ: (hidden, d),
            Role.DOWN_PROJ: (d, hidden),
            Role.LM_HEAD: (vocab_size, d),
        }

    def matrix_roles(self) -> dict[str, Role]:
        """Module name -> role of every matrix of the model, in the order of the forward pass."""
        roles = {"embed_tokens": Role.EMBEDDING}
        for layer in range(self.n_layers):
            for role in (Role.Q_PROJ, Role.K_PROJ, Role.V_PROJ, Role.O_PROJ):
                roles[f"layers.{layer}.self_attn.{role}"] = role
            for role in (Role.GATE_PROJ, Role.UP_PROJ, Role.DOWN_PROJ):
                roles[f"layers.{layer}.mlp.{role}"] = role
        return roles | {"lm_head": Role.LM_HEAD}

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim % 2:
            raise ConfigError("model.head_dim", self.head_dim, "must be even (rotary embedding)")
        if self.d_model % self.head_dim:
            allowed = f"must be a multiple of model.head_dim = {self.head_dim}"
            raise ConfigError("model.d_model", self.d_model, allowed)
        if self.n_heads % self.num_key_value_groups:
            allowed = f"must divide the {self.n_heads} heads (model.d_model / model.head_dim)"
            raise ConfigError("model.num_key_value_groups", self.num_key_value_groups, allowed)
        if abs(self.d_model * self.mlp_ratio - self.d_ff) > 1e-6:
            allowed = f"times model.d_model = {self.d_model} must be a whole number"
            raise ConfigError("model.mlp_ratio", self.mlp_ratio, allowed)
        return self


class PlacementConfig(_Section):
    """Which matrices carry learnable multipliers (arXiv:2601.04890 app. C) and where these start."""

    table: Literal["full", "minimal"] = "full"
    """Table of the paper: full is what it ran, minimal has no multipliers that trade scale channel by channel."""
    overrides: dict[str, str] = Field(default_factory=dict)
    """Module-name pattern -> none, scalar, row, column or sums such as row+column; the last match wins."""
    init: Literal["ones", "preset"] = "ones"
    """Start of the learnable multipliers: 1, or the preset's forward multipliers."""

    @field_validator("overrides", mode="before")
    @classmethod
    def _from_pairs(cls, given: Any) -> Any:
        """Accept pairs, as in a study's plan, which preserve the order when keys are sorted."""
        pairs = isinstance(given, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in given)
        return dict(given) if pairs else given


class ParametrizationConfig(_Section):
    """How init, learning rate, decay and forward factor of a matrix depend on its shape."""

    rule: Literal["standard", "mup"] = "mup"
    """standard: nothing scales with width. mup: scaled against a model of width base_d_model."""
    width_rule: WidthRule = "lr"
    """Which of the three muP rules of table 1: through the lr, lr and weight decay, or the forward multiplier; or
    lr_sqrt_wd, where weight decay rises as the square root only (arXiv:2510.15262)."""
    base_d_model: int = Field(32, gt=0)
    """Width at which mup and standard coincide; a multiple of head_dim."""
    depth_rule: DepthRule = Field("none", json_schema_extra=HASHED_UNLESS_DEFAULT)
    """On top of rule and width rule, against a model of base_n_layers: residual branches, and the rates of what is in
    blocks, scale with depth (arXiv:2505.01618). depth_mup: both by 1/sqrt. completep: branches by 1/depth, rates not.
    hyperp (hyperball optimizers alone, arXiv:2603.28743): rates by 1/sqrt, branches divided by sqrt(2 n_layers)."""
    base_n_layers: int = Field(2, gt=0, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Depth at which depth_mup and completep change nothing, and the lr of hyperp is the base lr."""
    attention_scale: Literal["1/sqrt(head_dim)", "1/head_dim"] = "1/sqrt(head_dim)"
    """Factor on the attention logits."""
    embedding_std: Number = Field(1.0, gt=0)
    """Standard deviation at which the embedding starts."""
    preset: str = "neutral"
    """Per-role forward, lr and weight-decay multipliers: the name of a shipped preset or a YAML file."""
    tier: Tier = "FULL"
    """How much of the preset to use: NONE of it, LR, LR and weight decay, or FULL (forward multipliers too)."""
    forward: dict[str, Number] = Field(default_factory=dict, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Role -> forward multiplier, in place of the preset's."""
    lr: dict[str, Number] = Field(default_factory=dict, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Role -> factor on the learning rate, in place of the preset's."""
    weight_decay: dict[str, Number] = Field(default_factory=dict, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Role -> factor on the weight decay, in place of the preset's."""


class OptimConfig(_Section):
    """AdamW, or Muon for the hidden matrices with AdamW for the rest."""

    lr: Number = Field(2**-6, gt=0)
    """Base learning rate of the matrices, at width base_d_model (and with a depth_rule at depth base_n_layers)."""
    weight_decay: Number = Field(0.1, ge=0)
    """Weight decay of the matrices."""
    weight_decay_mode: Literal["coupled", "independent", "corrected", "cautious", "timescale"] = "coupled"
    """coupled: a step decays a matrix by lr * weight_decay. independent: by weight_decay times the
    schedule, whatever the lr, so that fitting values are those of lr * weight_decay. corrected: coupled, times the
    schedule once more, for all matrices but the head (AdamC, arXiv:2506.02285). cautious: coupled, of the entries that
    the update shrinks (arXiv:2510.12402). timescale: weight_decay is lr * decay * steps, the decay times of the run, at
    any lr, width and number of steps (arXiv:2405.13698). Multipliers: always coupled."""
    betas: tuple[Number, Number] = OptimizerSettings.betas
    """AdamW's decay rates of the two moments."""
    eps: Number = Field(OptimizerSettings.eps, gt=0)
    """AdamW's epsilon."""
    muon_momentum: Number = Field(OptimizerSettings.muon_momentum, ge=0, lt=1)
    """Momentum of Muon, Nesterov's, and of Muown."""
    muon_ns_steps: int = Field(OptimizerSettings.muon_ns_steps, gt=0)
    """Newton-Schulz iterations of Muon."""
    muown_norm_lr: Number | None = Field(OptimizerSettings.muown_norm_lr, gt=0, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Muown's learning rate of row norms, without a factor by width; null: that of the matrix."""
    sphere: Literal["matrix", "row"] = Field(OptimizerSettings.sphere, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """What keeps its norm under sphere, hyperball and their Muon variants: each matrix, or each row by itself."""
    muon_coefficients: Literal["quintic", "polar_express"] = Field(
        OptimizerSettings.muon_coefficients, json_schema_extra=HASHED_UNLESS_DEFAULT
    )
    """Coefficients of these iterations: the same in each, or those of Polar Express (arXiv:2505.16932), which differ in
    the first five and bring singular values closer to 1."""
    scion_radius: Number = Field(OptimizerSettings.scion_radius, gt=0, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Radius of the spectral balls of hidden matrices under Scion. A step is lr * radius, so lr is 1e-3 or less."""
    scion_sign_radius: Number = Field(
        OptimizerSettings.scion_sign_radius, gt=0, json_schema_extra=HASHED_UNLESS_DEFAULT
    )
    """Radius of the LM head's ball of the largest entry under Scion, which is this over d_in."""
    scion_momentum: Number = Field(
        OptimizerSettings.scion_momentum, ge=0, lt=1, json_schema_extra=HASHED_UNLESS_DEFAULT
    )
    """Decay rate of Scion's momentum."""
    extra: dict[str, Any] = Field(default_factory=dict, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Further keyword arguments of an optimizer by import path."""
    vector_lr: Number = Field(1e-2, gt=0)
    """Learning rate of norm weights, in every arm alike, and of the multipliers unless multiplier_lr is set."""
    vector_lr_mode: Literal["absolute", "relative"] = "absolute"
    """absolute: vector_lr and multiplier_lr are rates. relative: they are factors on lr."""
    multiplier_lr: Number | None = Field(None, gt=0)
    """Learning rate of the multipliers; null: the same as vector_lr."""
    multiplier_weight_decay: Number = Field(2e-3, ge=0)
    """Weight decay of the multipliers, always coupled; against drift (paper sec. 4.1). Norm weights have none."""
    clip: Number | None = Field(1.0, gt=0)
    """Norm to which the gradient is clipped; null: no clipping."""
    qk_clip: Number | None = Field(None, gt=0, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Attention logit above which a step shrinks the queries and keys of a head (QK-clip of MuonClip, arXiv:2507.20534,
    there 100); null: no limit. It forms all logits once more."""
    clip_multipliers: bool = False
    """Count the multipliers' gradients in the norm that is clipped (the paper's fig. 6 shows that it hurts)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError("optim.betas", self.betas, "both must lie in [0, 1)")
        return self


class ScheduleConfig(_Section):
    """Learning-rate schedule, the same factor for every parameter group."""

    name: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """After a linear warmup: constant then exponential decay (wsd), or cosine, linear or no decay to the end."""
    warmup_fraction: Number = Field(0.1, ge=0, le=1)
    """Share of the steps spent in warmup."""
    decay_fraction: Number = Field(1 / 6, ge=0, le=1)
    """wsd: share of the steps spent in the final decay."""
    final_ratio: Number = Field(1 / 8, ge=0, le=1)
    """Rate at the end over the peak rate; above 0 for wsd, whose decay is exponential."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.name == "wsd" and self.final_ratio == 0:
            raise ConfigError("schedule.final_ratio", 0, "must be above 0 for wsd, whose decay is exponential")
        if self.name == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            allowed = f"with schedule.decay_fraction = {self.decay_fraction:g} must not exceed 1"
            raise ConfigError("schedule.warmup_fraction", self.warmup_fraction, allowed)
        return self


class DataConfig(_Section):
    """Text, its tokens, and the windows cut from them."""

    corpus: str = "stdlib"
    """stdlib (the running Python's library), hf:NAME (a Hugging Face data set), or a file or folder of
    .txt, .jsonl or .parquet (other endings are read as text). With +mini:SHARE behind it, that share of the text is
    the training part of the embedded benchmark."""
    hf_config: str | None = None
    """Configuration name of a Hugging Face data set."""
    hf_split: str = "train"
    """Split of a Hugging Face data set; validation documents are taken out of it."""
    streaming: bool = False
    """Stream a Hugging Face data set instead of downloading it whole; needs max_documents."""
    text_field: str = "text"
    """Field that holds the text in JSONL, parquet and Hugging Face data sets."""
    max_documents: int | None = Field(None, gt=0)
    """Use at most this many documents, from the first on."""
    tokenizer: str = "bytes"
    """bytes, bpe:SIZE (byte-level BPE trained on the corpus), or hf:NAME or a path (a Hugging Face tokenizer)."""
    seq_len: int = Field(128, gt=1)
    """Tokens of one training window, T."""
    val_fraction: Number = Field(0.05, gt=0, lt=1)
    """Share of the documents (or of a lone document's end) kept for validation."""
    val_windows: int = Field(64, gt=0)
    """Number of fixed validation windows, spread evenly over the validation tokens."""
    val_offset: Number = Field(0.0, ge=0, lt=1, json_schema_extra=HASHED_UNLESS_DEFAULT)
    """Shift of the validation windows in units of their spacing; 0.5 lies between those of 0, so that what was tuned on
    these is judged on others."""
    cache_dir: str | None = Field(None, json_schema_extra=NEVER_HASHED)
    """Folder of the token cache; null: LIT_MULT_CACHE or the user's cache folder."""


class TrainConfig(_Section):
    """Length of a run, and what is measured on the way."""

    steps: int = Field(300, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(16, gt=0)
    """Sequences in one optimizer step, over all devices and accumulated micro-batches."""
    eval_every: int | None = Field(None, gt=0)
    """Validate every so many steps; null: at the start and the end only."""
    checkpoint_every: int | None = Field(500, gt=0)
    """Write a checkpoint to resume from every so many steps; null: only when the run is stopped, and at its end."""
    keep_every: int | None = Field(None, gt=0, json_schema_extra=NEVER_HASHED)
    """Keep the weights every so many steps, for scores along training; null: none but the last checkpoint's."""
    log_every: int = Field(10, gt=0)
    """Steps averaged into one point of the training-loss curve; also the pace of TensorBoard."""
    divergence_factor: Number = Field(2.0, gt=1)
    """A training loss (mean of log_every steps) above this many initial losses ends the run as diverged."""
    diagnostics: list[Diagnostic] = Field(default_factory=list, json_schema_extra=NEVER_HASHED)
    """What to record on the way, in diagnostics.parquet: norms, rows (row and column norms), outputs, updates,
    gradients, symmetry, noise (signal and noise of gradients; an extra backward pass), brownian (what pure noise makes
    of the parameters under the run's optimizer; simulated at the end)."""
    diagnostics_every: int = Field(50, gt=0, json_schema_extra=NEVER_HASHED)
    """Optimizer steps from one recording to the next; the first is at the start, the last at the end of the run."""


class TrainerConfig(_Section):
    """Flags of the Lightning Trainer."""

    accelerator: str = "auto"
    """Lightning accelerator."""
    devices: int | str = 1
    """Lightning devices."""
    num_nodes: int = Field(1, gt=0)
    """Lightning num_nodes."""
    strategy: str = "auto"
    """Lightning strategy (auto, ddp, ...); or fsdp2, which shards parameters and optimizer states over the devices."""
    precision: str = "32-true"
    """Lightning precision (32-true, bf16-mixed, ...); in bf16-true multipliers and norm weights stay in float32."""
    accumulate_grad_batches: int = Field(1, gt=0)
    """Micro-batches in one optimizer step; divides batch_size."""
    compile: bool = False
    """Run the model through torch.compile."""
    tensorboard: bool = Field(True, json_schema_extra=NEVER_HASHED)
    """Write TensorBoard logs beside the record."""
    progress_bar: bool = Field(True, json_schema_extra=NEVER_HASHED)
    """Show the steps, the rate and the loss."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments of lightning.Trainer."""


class RunConfig(_Section):
    """Everything that decides the outcome of one training run."""

    multipliers: MultiplierKind = Field("none", description=_choices(KINDS))
    optimizer: str = Field("adamw", description=_choices(OPTIMIZERS) + _IMPORTED)
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initialization, the order of the data and dropout."""
    model: ModelConfig = Field(default_factory=ModelConfig)
    """the model"""
    placement: PlacementConfig = Field(default_factory=PlacementConfig)
    """placement of the learnable multipliers"""
    parametrization: ParametrizationConfig = Field(default_factory=ParametrizationConfig)
    """parametrization"""
    optim: OptimConfig = Field(default_factory=OptimConfig)
    """optimizer settings"""
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig)
    """learning-rate schedule"""
    data: DataConfig = Field(default_factory=DataConfig)
    """data"""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """length of the run and its measurements"""
    trainer: TrainerConfig = Field(default_factory=TrainerConfig)
    """flags of the Lightning Trainer"""

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        check_known(name)
        return name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.optim.extra and not is_imported(self.optimizer):
            raise ConfigError("optim.extra", self.optim.extra, f"is for import:MODULE.CLASS, not for {self.optimizer}")
        base, unit = self.parametrization.base_d_model, self.model.head_dim * self.model.num_key_value_groups
        if base % unit:
            allowed = f"must be a multiple of model.head_dim * model.num_key_value_groups = {unit}"
            raise ConfigError("parametrization.base_d_model", base, allowed)
        if self.train.batch_size % self.trainer.accumulate_grad_batches:
            allowed = f"must divide train.batch_size = {self.train.batch_size}"
            raise ConfigError("trainer.accumulate_grad_batches", self.trainer.accumulate_grad_batches, allowed)
        self._check_qk_clip()
        if "noise" in self.train.diagnostics and self.train.batch_size % 2:
            raise ConfigError("train.batch_size", self.train.batch_size, "must be even: the diagnostic noise halves it")
        return self

    def _check_qk_clip(self) -> None:
        limit = self.optim.qk_clip
        if limit is None:
            return
        used = {trained_by(role, self.optimizer) for role in (Role.Q_PROJ, Role.K_PROJ)}
        for is_set, field in (
            (self.model.qk_norm, "model.qk_norm = True, whose norms bound the logits"),
            (self.trainer.compile, "trainer.compile = True"),
            (self.trainer.strategy == "fsdp2", "trainer.strategy = fsdp2"),
            (not KINDS[self.multipliers].is_plain, f"multipliers = {self.multipliers}, which are no plain product"),
            (any(OPTIMIZERS[name].owns_weights for name in used), f"optimizer = {self.optimizer}, which settles norms"),
        ):
            if is_set:
                raise ConfigError("optim.qk_clip", limit, f"cannot go with {field}")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RunConfig:
        """Build a config from nested plain values.

        Raises:
            ConfigError: a field is unknown or holds a value that is not allowed.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise config_error(error, field_names(cls)) from None

    def to_dict(self) -> dict[str, Any]:
        """All settings as nested plain values (JSON types), for `from_dict`."""
        return self.model_dump(mode="json")

    def with_overrides(self, overrides: Mapping[str, Any]) -> RunConfig:
        """A validated copy with dotted fields set, such as `{"model.d_model": 128}`."""
        data = self.to_dict()
        for path, value in overrides.items():
            set_dotted(data, path, value)
        return self.from_dict(data)

    def on_devices_of(self, other: RunConfig) -> RunConfig:
        """This run on the devices of another: a checkpoint of either is one of the other, if all else is equal."""
        devices = {name: getattr(other.trainer, name) for name in ("devices", "num_nodes", "strategy")}
        return self.model_copy(update={"trainer": self.trainer.model_copy(update=devices)})

    def hashed_fields(self) -> dict[str, Any]:
        """The settings that affect results (see `NEVER_HASHED`), as nested plain values."""
        data = self.to_dict()
        _drop_unhashed(self, data)
        if overrides := data["placement"]["overrides"]:  # their order matters
            data["placement"]["overrides"] = [list(pair) for pair in overrides.items()]
        if self.model.pretrained is not None:  # its content matters, not its path
            folder, pin = split_pin(self.model.pretrained)
            data["model"]["pretrained"] = pin or folder
        return data

    @property
    def hash(self) -> str:
        """16 hex digits of the hashed fields: runs with equal hash and corpus are the same run."""
        return hashlib.sha256(json.dumps(self.hashed_fields(), sort_keys=True).encode()).hexdigest()[:16]


def _drop_unhashed(section: BaseModel, data: dict[str, Any]) -> None:
    """Remove the fields of a section that the hash excludes."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, _Section):
            _drop_unhashed(value, data[name])
        is_default = value == field.get_default(call_default_factory=True)
        mark = field.json_schema_extra
        if mark == NEVER_HASHED or (mark == HASHED_UNLESS_DEFAULT and is_default):
            del data[name]


def split_pin(pretrained: str) -> tuple[str, str | None]:
    """FOLDER and HASH of `model.pretrained`; None for a missing hash."""
    match = re.fullmatch(r"(.+)@([0-9a-f]{16})", pretrained, re.DOTALL)
    return (match[1], match[2]) if match else (pretrained, None)


def set_dotted(data: dict[str, Any], path: str, value: Any) -> None:
    """Set `data["a"]["b"] = value` for the path "a.b"; intermediate mappings are created.

    The rest of the path after an open field is one key: `placement.overrides.layers.0.*`.
    """
    opened = next((field for field in OPEN_FIELDS if path.startswith(f"{field}.")), None)
    *parents, leaf = [*opened.split("."), path[len(opened) + 1 :]] if opened else path.split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise ConfigError(path, value, f"unknown field ({parent} has no parts)")
    data[leaf] = value


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in data.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def differences(held: Mapping[str, Any], wanted: Mapping[str, Any], limit: int = 4) -> str:
    """Differences of nested plain values, on one line: `field: old -> new; ...`; empty when equal."""
    old, new = flatten(held), flatten(wanted)
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    changes = [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in names[:limit]]
    return "; ".join(changes + [f"and {len(names) - limit} more"] * (len(names) > limit))


def field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of all leaf fields of a config."""
    names = []
    for name, field in model.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseModel):
            names += field_names(part, f"{prefix}{name}.")
        else:
            names.append(prefix + name)
    return names


def config_error(error: ValidationError, known: Iterable[str] = ()) -> ConfigError:
    """One of pydantic's errors as a `ConfigError`; `known`: names to suggest for an unknown field.

    An unknown field comes before all else, as a misspelt name is a missing one too.
    """
    first = min(error.errors(), key=lambda fault: fault["type"] != "extra_forbidden")
    # A name in parentheses is that of one of several forms of a value (`study.grids.Grid`), which nobody wrote.
    field = ".".join(str(part) for part in first["loc"] if not str(part).startswith("("))
    if first["type"] == "extra_forbidden":
        other = " (arguments of Trainer without one go into trainer.extra)" if field.startswith("trainer.") else ""
        return ConfigError(field, first["input"], f"unknown field{other}{did_you_mean(field, known)}")
    if first["type"] == "missing":  # its input is all that surrounds it
        return ConfigError(field, None, "must be given")
    if first["type"] == "list_type":
        such_as = "" if isinstance(first["input"], dict) else f", such as [{first['input']}]"
        return ConfigError(field, first["input"], f"must be a list{such_as}")
    choices = re.findall(r"'(.*?)'", first["ctx"]["expected"]) if first["type"] == "literal_error" else []
    hint = (choices and fault_of(first["input"])) or did_you_mean(first["input"], choices)
    return ConfigError(field, first["input"], first["msg"][0].lower() + first["msg"][1:] + hint)
