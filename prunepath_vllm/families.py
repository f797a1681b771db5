"""The model families: one row each. Conversion, validation, transformers and vLLM registration all read this table.

Adding a family: docs/adding_a_model.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prunepath_vllm.errors import ConfigError
from prunepath_vllm.tau import shown


@dataclass(frozen=True)
class Family:
    """Where one dense architecture keeps its feed-forward layers, and which classes stand in for it.

    Tensor names are templates over the layer index, without ``.weight`` / ``.bias``.
    """

    name: str
    dense_model_type: str
    dense_architecture: str
    """The dense class whose checkpoints convert, as config.json's ``architectures`` names it."""
    auto_class: str
    """The transformers Auto class that loads a checkpoint."""
    ffn: str
    """The module that owns the router: ``<ffn>.router.weight``."""
    up: str
    """First linear: rows (Conv1D: columns) are neurons."""
    down: str
    """Second linear: columns (Conv1D: rows) are neurons."""
    embedding: str
    """Word embedding, full tensor name; [vocab_size, hidden]."""
    gate: str | None = None
    """GLU families: the linear under the activation, whose rows the split clusters."""
    merged: str | None = None
    """Where dense checkpoints hold gate and up as one linear, the gate's rows first; conversion splits it."""
    conv1d: bool = False
    """Weights stored [in, out] (GPT-2's Conv1D) instead of [out, in]."""
    base_prefix: str = ""
    """Prefix of the backbone; checkpoints saved from the bare backbone lack it and are renamed on conversion."""
    tied: bool = False
    """Whether the output embeddings are the word embeddings where config.json does not say."""
    default_activation: str = "silu"
    """The activation function where config.json does not say."""
    attention: str = ""
    """The self-attention module, which routers may read the input of: the output of the block's first norm, or of the
    block before where norms come last (RoBERTa)."""
    adapted: tuple[str, ...] = ()
    """Linears of the attention module that LoRA adapters may change; none where the engine takes no adapters."""
    dense_backbone: str = ""
    """GLU families: transformers' class between embedding and head; ``<stem>Model`` unless given."""
    dense_config: str = ""
    """transformers' configuration class; ``<stem>Config`` unless given."""
    engine_module: str = ""
    """GLU families: the module of ``vllm.model_executor.models`` with the dense class."""
    caps_attention: bool = False
    """Whether attention scores are capped; transformers' sdpa leaves the cap out, eager does not."""
    rope_kinds: tuple[str, ...] = ("default", "linear", "llama3", "yarn")
    """Rotary embeddings that engine and transformers compute alike for it, of ``fields.ROPE_KINDS``."""
    partial_rope: bool = False
    """Whether engine and transformers both rotate a part of each head, where partial_rotary_factor says so."""
    rope_by_layer_kind: bool = False
    """Whether each kind of layer has a rotary embedding of its own."""
    one_window: bool = False
    """Whether the engine has one sliding window for all layers, where transformers may have it on some."""
    float16: bool = True
    """Whether values fit float16."""
    engine_ffn: str = ""
    """GLU families: the feed-forward class that vLLM's model is built of, ``module:name`` in the same package."""
    hidden_size_field: str = "hidden_size"
    intermediate_size_field: str = "intermediate_size"
    num_layers_field: str = "num_hidden_layers"
    activation_field: str = "hidden_act"
    positions_field: str = "max_position_embeddings"
    positions_follow_padding: bool = False
    """Positions count from pad_token_id + 1, so that the table's first rows are no position of any token."""

    @property
    def dense_options(self) -> dict[str, str]:
        """Arguments of ``from_pretrained`` with which the dense model computes what its configuration says."""
        return {"attn_implementation": "eager"} if self.caps_attention else {}

    @property
    def model_type(self) -> str:
        """``model_type`` of a converted checkpoint; foreign to an engine without the plugin."""
        return f"prunepath_{self.name}"

    @property
    def architecture(self) -> str:
        """``architectures`` entry of a converted checkpoint, and the name in vLLM's model registry."""
        return f"PrunePath{self.dense_architecture}"

    @property
    def stem(self) -> str:
        """What the dense classes' names begin with: "Qwen2" of Qwen2ForCausalLM."""
        return self.dense_architecture.split("For")[0].removesuffix("LMHeadModel")

    @property
    def config_class(self) -> str:
        """transformers configuration class, as ``module:name``."""
        return f"prunepath_vllm.modeling.configuration_{self._file}:PrunePath{self.dense_config_class}"

    @property
    def model_class(self) -> str:
        """transformers model class, as ``module:name``."""
        return f"prunepath_vllm.modeling.modeling_{self._file}:{self.architecture}"

    @property
    def engine_class(self) -> str:
        """vLLM model class, as ``module:name``."""
        return f"prunepath_vllm.model_executor.models.{self._file}:{self.architecture}"

    @property
    def dense_config_class(self) -> str:
        """Name of transformers' configuration class of the dense model."""
        return self.dense_config or f"{self.stem}Config"

    @property
    def dense_backbone_class(self) -> str:
        """Name of transformers' class of the dense model without its head."""
        return self.dense_backbone or f"{self.stem}Model"

    @property
    def _file(self) -> str:
        # The classes of every GLU family are made from its row, in one file of each kind.
        return self.name if self.gate is None else "glu"

    def hidden_size(self, config: Mapping[str, Any]) -> int:
        """Model width from a config.json mapping."""
        return _positive_int(config, self.hidden_size_field)

    def num_layers(self, config: Mapping[str, Any]) -> int:
        """Number of layers from a config.json mapping."""
        return _positive_int(config, self.num_layers_field)

    def intermediate_size(self, config: Mapping[str, Any]) -> int:
        """d_ff from a config.json mapping (GPT-2 may leave it to 4 * hidden_size)."""
        if self.conv1d and config.get(self.intermediate_size_field) is None:
            return 4 * self.hidden_size(config)
        return _positive_int(config, self.intermediate_size_field)

    def activation(self, config: Mapping[str, Any]) -> str:
        """Name of the activation function, in transformers' ACT2FN terms."""
        return str(config.get(self.activation_field, self.default_activation))

    def positions(self, config: Mapping[str, Any]) -> int | None:
        """How many tokens a sequence may have by the position table's rows; None where config.json does not say."""
        if config.get(self.positions_field) is None:
            return None
        rows = _positive_int(config, self.positions_field)
        if not self.positions_follow_padding:
            return rows
        padding = config.get("pad_token_id", 1)
        if not isinstance(padding, int) or isinstance(padding, bool) or padding < 0:
            raise ConfigError(f"pad_token_id: {shown(padding)}; expected a token's number, positions start behind it")
        return rows - padding - 1

    def head(self, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors between the backbone and the output."""
        hidden = self.hidden_size(config)
        if self.auto_class == "AutoModelForCausalLM":
            if config.get("tie_word_embeddings", self.tied):
                return {}
            return {"lm_head.weight": (_positive_int(config, "vocab_size"), hidden)}
        labels = config.get("id2label")
        count = len(labels) if isinstance(labels, Mapping) and labels else config.get("num_labels", 2)
        return {
            "classifier.dense.weight": (hidden, hidden),
            "classifier.dense.bias": (hidden,),
            "classifier.out_proj.weight": (count, hidden),
            "classifier.out_proj.bias": (count,),
        }

    def router(self, layer: int) -> str:
        """Name of a layer's router, without ``.weight`` / ``.bias``."""
        return f"{self.ffn.format(layer)}.router"

    def inputs(self, layer: int) -> list[str]:
        """Linears whose outputs are neurons: gate (GLU families) and up."""
        return [name.format(layer) for name in (self.gate, self.up) if name is not None]

    def dense_inputs(self, layer: int) -> list[str]:
        """:meth:`inputs` as the dense model has them: one linear where it holds them merged, the gate's rows first."""
        return self.inputs(layer) if self.merged is None else [self.merged.format(layer)]

    def output(self, layer: int) -> str:
        """The linear whose inputs are neurons."""
        return self.down.format(layer)

    def neuron_axes(self, layer: int) -> dict[str, int]:
        """The tensors of a layer that have a dimension of d_ff neurons, and which one it is."""
        axes: dict[str, int] = {}
        for name in self.inputs(layer):
            axes |= {f"{name}.weight": 1 if self.conv1d else 0, f"{name}.bias": 0}
        return axes | {f"{self.output(layer)}.weight": 0 if self.conv1d else 1}

    def out_in(self, weight: Any) -> Any:
        """A linear's weight as [out, in], however the family stores it; a view, and its own inverse."""
        return weight.T if self.conv1d else weight


def _glu(name: str, dense_architecture: str, engine_ffn: str, **fields: Any) -> Family:
    """A decoder whose feed-forward layers are down(act(gate(x)) * up(x)); its classes are made from the row."""
    row: dict[str, Any] = dict(
        name=name,
        dense_model_type=name,
        dense_architecture=dense_architecture,
        auto_class="AutoModelForCausalLM",
        ffn="model.layers.{}.mlp",
        gate="model.layers.{}.mlp.gate_proj",
        up="model.layers.{}.mlp.up_proj",
        down="model.layers.{}.mlp.down_proj",
        attention="model.layers.{}.self_attn",
        adapted=("q_proj", "k_proj", "v_proj", "o_proj"),
        embedding="model.embed_tokens.weight",
        base_prefix="model.",
        engine_module=name,
        engine_ffn=engine_ffn,
    )
    return Family(**{**row, **fields})


FAMILIES: tuple[Family, ...] = (
    _glu("llama", "LlamaForCausalLM", "llama:LlamaMLP"),
    _glu("qwen2", "Qwen2ForCausalLM", "qwen2:Qwen2MLP", one_window=True),
    _glu("qwen3", "Qwen3ForCausalLM", "qwen3:Qwen3MLP", one_window=True),
    _glu("mistral", "MistralForCausalLM", "llama:LlamaMLP"),
    _glu(
        "phi3",
        "Phi3ForCausalLM",
        "llama:LlamaMLP",
        merged="model.layers.{}.mlp.gate_up_proj",
        adapted=("qkv_proj", "o_proj"),
        rope_kinds=("default", "longrope", "su"),  # transformers takes Phi-3's "yarn" for "longrope" as well
        partial_rope=True,
    ),
    _glu("granite", "GraniteForCausalLM", "granite:GraniteMLP"),
    _glu(
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2:Gemma2MLP",
        tied=True,
        activation_field="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        caps_attention=True,
        float16=False,
    ),
    _glu(
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3:Gemma3MLP",
        dense_config="Gemma3TextConfig",
        dense_backbone="Gemma3TextModel",
        engine_module="gemma3",
        rope_kinds=("default", "linear"),
        rope_by_layer_kind=True,
        tied=True,
        activation_field="hidden_activation",
        default_activation="gelu_pytorch_tanh",
        float16=False,
    ),
    Family(
        name="gpt2",
        dense_model_type="gpt2",
        dense_architecture="GPT2LMHeadModel",
        auto_class="AutoModelForCausalLM",
        ffn="transformer.h.{}.mlp",
        attention="transformer.h.{}.attn",
        up="transformer.h.{}.mlp.c_fc",
        down="transformer.h.{}.mlp.c_proj",
        embedding="transformer.wte.weight",
        conv1d=True,
        base_prefix="transformer.",
        hidden_size_field="n_embd",
        intermediate_size_field="n_inner",
        num_layers_field="n_layer",
        activation_field="activation_function",
        default_activation="gelu_new",
        positions_field="n_positions",
        tied=True,
    ),
    Family(
        name="roberta",
        dense_model_type="roberta",
        dense_architecture="RobertaForSequenceClassification",
        auto_class="AutoModelForSequenceClassification",
        ffn="roberta.encoder.layer.{}.intermediate",
        attention="roberta.encoder.layer.{}.attention",
        up="roberta.encoder.layer.{}.intermediate.dense",
        down="roberta.encoder.layer.{}.output.dense",
        embedding="roberta.embeddings.word_embeddings.weight",
        positions_follow_padding=True,
        base_prefix="roberta.",
        default_activation="gelu",
    ),
)


def family_of(config: Mapping[str, Any], *, converted: bool) -> Family:
    """The family of a config.json mapping.

    Args:
        config: parsed config.json.
        converted: look for a PrunePath checkpoint (True) or a dense one (False).

    Raises:
        ConfigError: no row matches both ``model_type`` and ``architectures``.
    """
    model_type = config.get("model_type")
    architectures = config.get("architectures") or []
    kind = "PrunePath" if converted else "dense"
    for family in FAMILIES:
        expected_type = family.model_type if converted else family.dense_model_type
        expected = family.architecture if converted else family.dense_architecture
        if model_type != expected_type:
            continue
        if not isinstance(architectures, list) or architectures[:1] != [expected]:
            raise ConfigError(
                f"architectures: got {architectures!r}; expected [{expected!r}] with model_type {model_type!r}"
            )
        return family
    known = ", ".join(family.model_type if converted else family.dense_model_type for family in FAMILIES)
    raise ConfigError(f"model_type: {model_type!r} is not a {kind} family; expected one of {known}")


def _positive_int(config: Mapping[str, Any], field: str) -> int:
    value = config.get(field)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise ConfigError(f"{field}: expected a positive integer, got {shown(value)}")
    return value
