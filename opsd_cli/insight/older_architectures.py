"""Architectures whose layers have layer norms with a bias and an MLP without a gate: GPT-2 and what came after it.
Apart from `architectures`, which lists them with the others."""

from __future__ import annotations

from opsd_cli.insight.model_shape import (
    Layer,
    Matrix,
    Settings,
    Shape,
    gated_mlp,
    make_shape,
    plain_mlp,
    projections,
    refuse,
)
from opsd_cli.settings.errors import DataError


def phi(c: Settings) -> Shape:
    refuse(c, "qk_layernorm")
    width, inner = c["hidden_size"], c["intermediate_size"]
    matrices = (*projections(c, bias=True, out="dense"), *plain_mlp(width, inner, bias=True, names="fc1 fc2"))
    layers = [Layer(matrices, 2 * width)] * c["num_hidden_layers"]
    return make_shape(c, layers, inner=inner, outside=2 * width + c["vocab_size"], gated=False)


def stablelm(c: Settings) -> Shape:
    refuse(c, "qk_layernorm")
    width, inner = c["hidden_size"], c["intermediate_size"]
    matrices = (*projections(c, bias=bool(c.get("use_qkv_bias")), out_bias=False), *gated_mlp(width, inner))
    norms = 1 if c.get("use_parallel_residual") else 2
    return make_shape(c, [Layer(matrices, 2 * norms * width)] * c["num_hidden_layers"], inner=inner, outside=2 * width)


def starcoder2(c: Settings) -> Shape:
    width, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c.get("use_bias", True))
    matrices = (*projections(c, bias=bias), *plain_mlp(width, inner, bias=bias, names="c_fc c_proj"))
    layers = [Layer(matrices, 4 * width)] * c["num_hidden_layers"]
    return make_shape(c, layers, inner=inner, tied=True, outside=2 * width, gated=False)


def gpt2(c: Settings) -> Shape:
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    matrices = (
        Matrix("c_attn", width, 3 * width, True), Matrix("c_proj", width, width, True),
        *plain_mlp(width, inner, bias=True, names="c_fc c_proj"),
    )  # fmt: skip
    return older(c, matrices, width, c["n_layer"], c["n_head"], inner, positions=c["n_positions"])


def gptj(c: Settings) -> Shape:
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    attention = [Matrix(name, width, width) for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    matrices = (*attention, *plain_mlp(width, inner, bias=True, names="fc_in fc_out"))
    outside = 2 * width + c["vocab_size"]
    return older(c, matrices, width, c["n_layer"], c["n_head"], inner, outside=outside, norms=1, tied=False)


def gpt_neo(c: Settings) -> Shape:
    width = c["hidden_size"]
    inner = c.get("intermediate_size") or 4 * width
    attention = [Matrix(name, width, width) for name in ("k_proj", "v_proj", "q_proj")]
    matrices = (
        *attention, Matrix("out_proj", width, width, True), *plain_mlp(width, inner, bias=True, names="c_fc c_proj"),
    )  # fmt: skip
    positions = c["max_position_embeddings"]
    return older(c, matrices, width, c["num_layers"], c["num_heads"], inner, positions=positions)


def gpt_neox(c: Settings) -> Shape:
    width, inner, bias = c["hidden_size"], c["intermediate_size"], bool(c.get("attention_bias", True))
    matrices = (
        Matrix("query_key_value", width, 3 * width, bias), Matrix("dense", width, width, bias),
        *plain_mlp(width, inner, bias=True, names="dense_h_to_4h dense_4h_to_h"),
    )  # fmt: skip
    return older(c, matrices, width, c["num_hidden_layers"], c["num_attention_heads"], inner, tied=False)


def opt(c: Settings) -> Shape:
    width, inner, bias = c["hidden_size"], c["ffn_dim"], bool(c.get("enable_bias", True))
    if c.get("word_embed_proj_dim", width) != width or not c.get("layer_norm_elementwise_affine", True):
        raise DataError("opsd plan does not know opt with projected embeddings or norms without weights")
    attention = [Matrix(name, width, width, bias) for name in ("k_proj", "v_proj", "q_proj", "out_proj")]
    matrices = (*attention, *plain_mlp(width, inner, bias=bias, names="fc1 fc2"))
    positions = c["max_position_embeddings"] + 2
    ends = 2 * width if c.get("do_layer_norm_before", True) and not c.get("_remove_final_layer_norm") else 0
    layers, heads, outside = c["num_hidden_layers"], c["num_attention_heads"], ends + positions * width
    return older(c, matrices, width, layers, heads, inner, outside=outside)


def bloom(c: Settings) -> Shape:
    width = c.get("hidden_size") or c["n_embed"]
    matrices = (
        Matrix("query_key_value", width, 3 * width, True), Matrix("dense", width, width, True),
        *plain_mlp(width, 4 * width, bias=True, names="dense_h_to_4h dense_4h_to_h"),
    )  # fmt: skip
    return older(c, matrices, width, c["n_layer"], c["n_head"], 4 * width, outside=4 * width)


def mpt(c: Settings) -> Shape:
    width = c["d_model"]
    inner = int(c.get("expansion_ratio", 4) * width)
    matrices = (
        Matrix("Wqkv", width, 3 * width), Matrix("out_proj", width, width),
        *plain_mlp(width, inner, bias=False, names="up_proj down_proj"),
    )  # fmt: skip
    return older(c, matrices, width, c["n_layers"], c["n_heads"], inner, outside=width, norm=width)


def falcon(c: Settings) -> Shape:
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], bool(c.get("bias"))
    size, inner = width // heads, c.get("ffn_hidden_size") or 4 * width
    newer = bool(c.get("new_decoder_architecture"))
    kv_heads = c.get("num_kv_heads") or heads if newer else 1 if c.get("multi_query", True) else heads
    matrices = (
        Matrix("query_key_value", width, (heads + 2 * kv_heads) * size, bias), Matrix("dense", width, width, bias),
        *plain_mlp(width, inner, bias=bias, names="dense_h_to_4h dense_4h_to_h"),
    )  # fmt: skip
    of_attention = c.get("num_ln_in_parallel_attn") or 2
    norms = of_attention if newer else 1 if c.get("parallel_attn", True) else 2
    shape = older(c, matrices, width, c["num_hidden_layers"], heads, inner, norms=norms)
    return Shape(**(vars(shape) | {"kv_heads": kv_heads}))


def older(
    c: Settings, matrices: tuple[Matrix, ...], width: int, layers: int, heads: int, inner: int, *,
    positions: int = 0, outside: int | None = None, norms: int = 2, norm: int = 0, tied: bool = True,
) -> Shape:  # fmt: skip
    """Layer norms with a bias and an MLP without a gate; `norm` is the size of one."""
    layer = Layer(matrices, norms * (norm or 2 * width))
    outside = (2 * width if outside is None else outside) + positions * width
    sizes = {**c, "hidden_size": width}
    every = (heads, heads, width // heads)
    return make_shape(sizes, [layer] * layers, inner=inner, tied=tied, outside=outside, gated=False, heads=every)
