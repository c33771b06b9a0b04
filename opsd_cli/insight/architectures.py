"""From a config.json to a model's layers, without torch: each architecture is a function. Held by a test to torch's
meta device for every architecture of the zoo, weights and adapters.

One that is not here is read from the headers of its safetensors files where they are at hand (`model_lookup`), and
refused otherwise: a count that may be wrong is worse than none.
"""

from __future__ import annotations

from collections.abc import Callable

from opsd_cli.insight import older_architectures
from opsd_cli.insight.model_shape import (
    Layer,
    Matrix,
    Settings,
    Shape,
    expert_stack,
    gated_mlp,
    heads_of,
    make_shape,
    projections,
)
from opsd_cli.settings.errors import DataError


def shape_of(config: Settings) -> Shape:
    """The shape of the model that a config.json describes. Raises DataError for an architecture that is not known, or a
    variant of one."""
    kind = str(config.get("model_type", "unnamed"))
    if kind not in BUILDERS:
        raise DataError(
            f"the architecture {kind!r} is not known to opsd plan by its config.json; give a folder that holds its "
            "safetensors files, whose headers are counted"
        )
    try:
        shape = BUILDERS[kind](config)
        if not shape.layers or shape.parameters <= 0:
            raise DataError(f"config.json of model type {kind!r} describes a model without layers or weights")
        return shape
    except KeyError as error:
        raise DataError(f"config.json of model type {kind!r} has no {error}, which its size depends on") from None
    except (TypeError, ZeroDivisionError) as error:
        raise DataError(f"config.json of model type {kind!r} has a value of the wrong kind: {error}") from None


def llama(
    c: Settings, *, bias: bool | None = None, out_bias: bool | None = None, norms: int = 2, head_norms: str = "",
    tied: bool = False,
) -> Shape:  # fmt: skip
    """Separate projections and a gated MLP; `head_norms` is what norms of queries and keys are as wide as: `head`, or
    all heads together."""
    heads, kv_heads, size = heads_of(c)
    attention = projections(c, bias=bool(c.get("attention_bias")) if bias is None else bias, out_bias=out_bias)
    mlp = gated_mlp(c["hidden_size"], c["intermediate_size"], bias=bool(c.get("mlp_bias")))
    of_heads = {"": 0, "head": 2 * size, "all": (heads + kv_heads) * size}[head_norms]
    layer = Layer((*attention, *mlp), norms * c["hidden_size"] + of_heads)
    layers = [layer] * c["num_hidden_layers"]
    return make_shape(c, layers, inner=c["intermediate_size"], tied=tied, head_norms=bool(head_norms))


def cohere(c: Settings) -> Shape:
    return llama(c, norms=1, head_norms="all" if c.get("use_qk_norm") else "", tied=True)


def phi3(c: Settings) -> Shape:
    heads, kv_heads, size = heads_of(c)
    width, inner = c["hidden_size"], c["intermediate_size"]
    matrices = (
        Matrix("qkv_proj", width, (heads + 2 * kv_heads) * size), Matrix("o_proj", heads * size, width),
        Matrix("gate_up_proj", width, 2 * inner), Matrix("down_proj", inner, width),
    )  # fmt: skip
    return make_shape(c, [Layer(matrices, 2 * width)] * c["num_hidden_layers"], inner=inner)


def mixture(c: Settings, *, experts: str, inner: str, head_norms: str = "", used: str = "num_experts_per_tok") -> Shape:
    """Separate projections and a mixture of experts behind a router, in all layers or in some."""
    heads, kv_heads, size = heads_of(c)
    width, wide = c["hidden_size"], c[inner]
    count = c["num_local_experts"] if "num_local_experts" in c else c[experts]
    attention = projections(c, bias=bool(c.get("attention_bias")))
    norms = 2 * width + {"": 0, "head": 2 * size, "all": (heads + kv_heads) * size}[head_norms]
    mixed = Layer((*attention, Matrix("gate", width, count), *expert_stack(width, wide, count, c[used])), norms)
    dense = Layer((*attention, *gated_mlp(width, c["intermediate_size"])), norms)
    only, step = c.get("mlp_only_layers") or (), c.get("decoder_sparse_step") or 1
    is_mixed = [number not in only and (number + 1) % step == 0 for number in range(c["num_hidden_layers"])]
    layers = [mixed if mixes else dense for mixes in is_mixed]
    return make_shape(c, layers, inner=c[used] * wide, head_norms=bool(head_norms))


def gpt_oss(c: Settings) -> Shape:
    width, experts, inner = c["hidden_size"], c["num_local_experts"], c["intermediate_size"]
    used = c["num_experts_per_tok"]
    matrices = (
        *projections(c, bias=bool(c.get("attention_bias", True))), Matrix("router", width, experts, True, adapts=False),
        *expert_stack(width, inner, experts, used, adapts=False, bias=True),
    )  # fmt: skip
    layer = Layer(matrices, 2 * width + c["num_attention_heads"])
    return make_shape(c, [layer] * c["num_hidden_layers"], inner=used * inner)


def deepseek_v3(c: Settings) -> Shape:
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], bool(c.get("attention_bias"))
    plain, rotated, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    low_q, low_kv = c.get("q_lora_rank"), c["kv_lora_rank"]
    queries = heads * (plain + rotated)
    of_queries = [Matrix("q_proj", width, queries)]
    if low_q:
        of_queries = [Matrix("q_a_proj", width, low_q, bias), Matrix("q_b_proj", low_q, queries)]
    attention = (
        *of_queries, Matrix("kv_a_proj_with_mqa", width, low_kv + rotated, bias),
        Matrix("kv_b_proj", low_kv, heads * (plain + value)), Matrix("o_proj", heads * value, width, bias),
    )  # fmt: skip
    norms, inner, experts, used = (
        2 * width + (low_q or 0) + low_kv, c["moe_intermediate_size"], c["n_routed_experts"], c["num_experts_per_tok"],
    )  # fmt: skip
    shared = c["n_shared_experts"] * inner
    # peft puts its adapters beside the stacks, and none beside the MLPs whose matrices have the same names.
    mixed = Layer(
        (
            *attention,
            Matrix("gate", width, experts),
            *expert_stack(width, inner, experts, used),
            *gated_mlp(width, shared, adapts=False),
        ),
        norms,
    )
    dense = Layer((*attention, *gated_mlp(width, c["intermediate_size"], adapts=False)), norms)
    first = c["first_k_dense_replace"]
    layers = [dense if number < first else mixed for number in range(c["num_hidden_layers"])]
    sizes = (heads, heads, plain + rotated)
    return make_shape(c, layers, inner=used * inner + shared, heads=sizes)


def qwen3_5(c: Settings) -> Shape:
    heads, kv_heads, size = heads_of(c)
    width, number = c["hidden_size"], c["num_hidden_layers"]
    key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
    keys, values = key_heads * c["linear_key_head_dim"], value_heads * c["linear_value_head_dim"]
    mlp, mixed = gated_mlp(width, c["intermediate_size"]), 2 * keys + values
    full = Layer((
        Matrix("q_proj", width, 2 * heads * size), Matrix("k_proj", width, kv_heads * size),
        Matrix("v_proj", width, kv_heads * size), Matrix("o_proj", heads * size, width), *mlp,
    ), 2 * width + 2 * size)  # fmt: skip
    linear = Layer((
        Matrix("in_proj_qkv", width, mixed), Matrix("in_proj_z", width, values),
        Matrix("in_proj_b", width, value_heads), Matrix("in_proj_a", width, value_heads),
        Matrix("out_proj", values, width), *mlp,
    ), 2 * width + mixed * c["linear_conv_kernel_dim"] + c["linear_value_head_dim"] + 2 * value_heads)  # fmt: skip
    kinds = c.get("layer_types") or [
        "linear_attention" if (place + 1) % c.get("full_attention_interval", 4) else "full_attention"
        for place in range(number)
    ]
    layers = [full if kind == "full_attention" else linear for kind in kinds]
    return make_shape(c, layers, inner=c["intermediate_size"], head_norms=True)


def lfm2(c: Settings) -> Shape:
    width, inner, size = c["hidden_size"], c["intermediate_size"], c["hidden_size"] // c["num_attention_heads"]
    if c.get("block_auto_adjust_ff_dim", True):
        inner, multiple = int(2 * inner / 3), c.get("block_multiple_of", 256)
        if (factor := c.get("block_ffn_dim_multiplier")) is not None:
            inner = multiple * -(-int(factor * inner) // multiple)
    mlp, bias = gated_mlp(width, inner, names="w1 w3 w2"), bool(c.get("conv_bias"))
    attention = Layer((*projections(c, out="out_proj"), *mlp), 2 * width + 2 * size)
    convolution = Layer(
        (Matrix("in_proj", width, 3 * width, bias), Matrix("out_proj", width, width, bias), *mlp),
        2 * width + width * (c.get("conv_L_cache", 3) + bias),
    )
    layers = [attention if kind == "full_attention" else convolution for kind in c["layer_types"]]
    return make_shape(c, layers, inner=inner, tied=True, head_norms=True)


BUILDERS: dict[str, Callable[[Settings], Shape]] = {
    "llama": llama,
    "mistral": lambda c: llama(c, bias=False),
    "qwen2": lambda c: llama(c, bias=True, out_bias=False),
    "qwen3": lambda c: llama(c, head_norms="head"),
    "smollm3": lambda c: llama(c, tied=True),
    "olmo2": lambda c: llama(c, head_norms="all"),
    "granite": llama,
    "cohere": cohere,
    "gemma": lambda c: llama(c, tied=True),
    "gemma2": lambda c: llama(c, norms=4, tied=True),
    "gemma3_text": lambda c: llama(c, norms=4, head_norms="head", tied=True),
    "phi3": phi3,
    "phi": older_architectures.phi,
    "stablelm": older_architectures.stablelm,
    "starcoder2": older_architectures.starcoder2,
    "gpt2": older_architectures.gpt2,
    "gptj": older_architectures.gptj,
    "gpt_neo": older_architectures.gpt_neo,
    "gpt_neox": older_architectures.gpt_neox,
    "opt": older_architectures.opt,
    "bloom": older_architectures.bloom,
    "mpt": older_architectures.mpt,
    "falcon": older_architectures.falcon,
    "mixtral": lambda c: mixture(c, experts="num_local_experts", inner="intermediate_size"),
    "qwen3_moe": lambda c: mixture(c, experts="num_experts", inner="moe_intermediate_size", head_norms="head"),
    "olmoe": lambda c: mixture(c, experts="num_experts", inner="intermediate_size", head_norms="all"),
    "gpt_oss": gpt_oss,
    "deepseek_v3": deepseek_v3,
    "qwen3_5_text": qwen3_5,
    "lfm2": lfm2,
}
