"""An independent model of Oryx in plain PyTorch operations, written from the mathematics.

It shares nothing with the C++ code: linear mixers are token-by-token loops, attention is a masked softmax over
the whole sequence, gradients come from autograd. It reads the same model directories (config.json and
model.safetensors) and is slow on purpose. `dtype` is the computing type: float64 defines the meaning; float32 and
bfloat16 give the error that an honest implementation in that type has, for tolerances.

Shape letters: B batch, T time, d width, H query heads, J key/value heads, D head dimension.
"""

import json
import math
import pathlib
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

LINEAR = ("ssd", "gated_delta")
NORM_EPSILON = 1e-5
L2_EPSILON = 1e-6
ROPE_BASE = 10_000.0

# The defaults of the [model] options, by the set of mixers; alone, each is the baseline of its name.
DEFAULTS = {
    ("attention", "ssd"): dict(gate=True, short_conv=True, conv_activation="none", query_activation="none",
                               norm="full", norm_order="after_gate", rope="all", l2_norm="none"),
    ("attention", "gated_delta"): dict(gate=True, short_conv=True, conv_activation="silu",
                                       query_activation="silu", norm="per_head", norm_order="before_gate",
                                       rope="attention", l2_norm={"attention": "none",
                                                                  "gated_delta": "query_key"}),
    ("attention",): dict(gate=False, short_conv=False, conv_activation="none", query_activation="none",
                         norm="none", norm_order="after_gate", rope="all", l2_norm="none"),
    ("ssd",): dict(gate=True, short_conv=True, query_conv=True, conv_bias=True, conv_activation="silu",
                   query_activation="none", norm="full", norm_order="after_gate", rope="none", l2_norm="none"),
    ("gated_delta",): dict(gate=True, short_conv=True, query_conv=True, conv_activation="silu",
                           query_activation="none", norm="per_head", norm_order="before_gate", rope="none",
                           l2_norm="query_key"),
}


@dataclass
class Config:
    layers: int
    width: int
    heads: int
    head_dim: int     # of queries and keys
    kv_heads: int     # key heads
    value_heads: int  # value heads; a linear mixer has one state for each
    value_dim: int
    mlp_width: int
    vocabulary: int
    mixers: tuple
    gate: bool
    short_conv: bool
    conv_activation: str  # none | silu, of keys and values, after the convolution where there is one
    norm: str             # full | per_head | none
    norm_order: str       # after_gate: norm(O * G) | before_gate: norm(O) * G
    rope: str             # all | attention | none
    shared_query: bool
    query_conv: bool = False  # queries pass through a convolution of their own as well
    conv_bias: bool = False
    hybrid: str = "none"      # inter_layer: layer n has the one mixer layer_pattern[n mod size];
                              # intra_layer: every mixer serves every token, their normed outputs are averaged
    layer_pattern: tuple = ()
    query_activation: dict = field(default_factory=dict)  # mixer -> none | silu
    l2_norm: dict = field(default_factory=dict)           # mixer -> none | key | query_key


def resolve(values):
    """The Config of a flat config.json object; per-mixer options are written "<mixer>.<option>"."""
    mixers = tuple(values["mixers"])
    options = dict(DEFAULTS[mixers])
    per_mixer = {}
    for name in ("query_activation", "l2_norm"):
        default = options.pop(name)
        per_mixer[name] = {m: values.get(f"{m}.{name}", default[m] if isinstance(default, dict) else default)
                           for m in mixers}
    options.setdefault("query_conv", False)
    options.setdefault("conv_bias", False)
    options.update(shared_query=False, hybrid="none", layer_pattern=())
    for name in options:
        options[name] = values.get(name, options[name])
    sizes = {name: values[name] for name in ("layers", "width", "heads", "mlp_width", "vocabulary")}
    sizes["head_dim"] = values.get("head_dim") or values["width"] // values["heads"]
    sizes["kv_heads"] = values.get("kv_heads") or values["heads"]
    sizes["value_heads"] = values.get("value_heads") or sizes["kv_heads"]
    sizes["value_dim"] = values.get("value_dim") or sizes["head_dim"]
    return Config(mixers=mixers, **sizes, **options, **per_mixer)


def output_heads(c):
    """Either several queries read one state, or one query reads several states."""
    return max(c.heads, c.value_heads)


def mixers_of(c, layer):
    return (c.layer_pattern[layer % len(c.layer_pattern)],) if c.hybrid == "inter_layer" else c.mixers


def parameter_shapes(c):
    """Name -> shape of every tensor of a model, in the order of the forward pass."""
    inner = output_heads(c) * c.value_dim
    channels = {"key": c.kv_heads * c.head_dim, "value": c.value_heads * c.value_dim, "query": c.heads * c.head_dim}
    norm = (inner if c.norm == "full" else c.value_dim,)
    shapes = {"embedding.weight": (c.vocabulary, c.width)}
    for n in range(c.layers):
        layer = f"layers.{n}."
        mixer = layer + "mixer."
        shapes[layer + "mixer_norm.weight"] = (c.width,)
        shapes[mixer + "key.weight"] = (channels["key"], c.width)
        shapes[mixer + "value.weight"] = (channels["value"], c.width)
        if c.gate:
            shapes[mixer + "gate.weight"] = (inner, c.width)
        shapes[mixer + "output.weight"] = (c.width, inner)
        if c.short_conv:
            for which in ("key", "value", "query") if c.query_conv else ("key", "value"):
                shapes[f"{mixer}{which}_conv.weight"] = (channels[which], 4)
                if c.conv_bias:
                    shapes[f"{mixer}{which}_conv.bias"] = (channels[which],)
        if c.norm != "none" and c.hybrid != "intra_layer":
            shapes[mixer + "norm.weight"] = norm
        if c.shared_query:
            shapes[mixer + "query.weight"] = (channels["query"], c.width)
        for m in mixers_of(c, n):
            if not c.shared_query:
                shapes[f"{mixer}{m}.query.weight"] = (channels["query"], c.width)
            if c.norm != "none" and c.hybrid == "intra_layer":
                shapes[f"{mixer}{m}.norm.weight"] = norm
            if m == "ssd":
                shapes[mixer + "ssd.step.weight"] = (c.value_heads, c.width)
                shapes[mixer + "ssd.step_bias"] = (c.value_heads,)
                shapes[mixer + "ssd.A_log"] = (c.value_heads,)
                shapes[mixer + "ssd.D"] = (output_heads(c),)
            if m == "gated_delta":
                shapes[mixer + "gated_delta.decay.weight"] = (c.value_heads, c.width)
                shapes[mixer + "gated_delta.decay_bias"] = (c.value_heads,)
                shapes[mixer + "gated_delta.A_log"] = (c.value_heads,)
                shapes[mixer + "gated_delta.beta.weight"] = (c.value_heads, c.width)
        shapes[layer + "mlp_norm.weight"] = (c.width,)
        shapes[layer + "mlp.gate.weight"] = (c.mlp_width, c.width)
        shapes[layer + "mlp.up.weight"] = (c.mlp_width, c.width)
        shapes[layer + "mlp.down.weight"] = (c.width, c.mlp_width)
    shapes["final_norm.weight"] = (c.width,)
    return shapes


def random_weights(config, seed, dtype=torch.float64):
    """Weights large enough that every path of a small model matters: matrices keep the variance of their input,
    norms scatter about one, decays cover memories from one token to hundreds."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda shape: torch.randn(shape, generator=generator, dtype=torch.float64)
    uniform = lambda shape, low, high: low + (high - low) * torch.rand(shape, generator=generator,
                                                                       dtype=torch.float64)
    weights = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("A_log"):
            value = uniform(shape, 0.02, 4.0).log()
        elif name.endswith(("step_bias", "decay_bias")):
            step = uniform(shape, math.log(1e-3), math.log(1e-1)).exp()
            value = step + torch.log(-torch.expm1(-step))  # the inverse of softplus
        elif "_conv." in name:
            value = uniform(shape, -0.5, 0.5)
        elif name.endswith(".D") or len(shape) == 1:
            value = 1 + 0.2 * normal(shape)
        elif name == "embedding.weight":
            value = 0.5 * normal(shape)
        else:
            value = normal(shape) / math.sqrt(shape[1])
        weights[name] = value.to(dtype)
    return weights


def write_model(directory, values, weights, tokenizer="bytes"):
    """A model directory: `values` are the keys of [model], flat."""
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(values, tokenizer=tokenizer, format_version=1)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, directory / "model.safetensors")


def read_weights(directory):
    """All tensors of a model directory, sharded or not."""
    directory = pathlib.Path(directory)
    index = directory / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights = {}
    for name in files:
        weights.update(load_file(directory / name))
    return weights


def read_model(directory, dtype=torch.float64):
    values = json.loads((pathlib.Path(directory) / "config.json").read_text())
    return Model(resolve(values), read_weights(directory), dtype)


def short_conv(x, weight):
    """Depthwise and causal. x [B, T, channels], weight [channels, 4]; column 3 multiplies the current token."""
    length = x.shape[1]
    padded = torch.cat([x.new_zeros(x.shape[0], 3, x.shape[2]), x], dim=1)
    return sum(padded[:, i:i + length] * weight[:, i] for i in range(4))


def rope(x):
    """Rotates the pairs (i, i + D/2) of x [B, T, heads, D] by the position along T."""
    length, half = x.shape[1], x.shape[3] // 2
    frequency = ROPE_BASE ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(length, dtype=torch.float64)[:, None, None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def l2_norm(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPSILON)


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + NORM_EPSILON) * weight


def spread(x, heads):
    """Head h of the result reads head h / (heads / x's heads). x [B, T, few, ...] -> [B, T, heads, ...]."""
    return x.repeat_interleave(heads // x.shape[2], dim=2)


def attention(q, k, v):
    """q [B, T, H, D], k and v [B, T, J, D] -> [B, T, H, D]: position t sees the keys up to t, itself included."""
    length, heads = q.shape[1:3]
    k, v = spread(k, heads), spread(v, heads)
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("bhts,bshd->bthd", scores.masked_fill(future, -math.inf).softmax(-1), v)


def ssd(q, k, v, log_decay, step):
    """S_t = e^{log_decay_t} S_{t-1} + step_t k_t^T v_t; o_t = q_t S_t.

    q [B, T, H, D], k [B, T, keys, D], v [B, T, J, E], log_decay and step [B, T, J]
    -> ([B, T, max(H, J), E], S [B, J, D, E])
    """
    heads, states = max(q.shape[2], v.shape[2]), v.shape[2]
    q, k = spread(q, heads), spread(k, states)
    state = v.new_zeros(v.shape[0], states, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        decay, weight = log_decay[:, t].exp()[..., None, None], step[:, t][..., None, None]
        state = decay * state + weight * k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, dim=1), state


def gated_delta(q, k, v, log_decay, beta):
    """S_t = e^{log_decay_t} (I - beta_t k_t^T k_t) S_{t-1} + beta_t k_t^T v_t; o_t = q_t S_t / sqrt(D)."""
    heads, states = max(q.shape[2], v.shape[2]), v.shape[2]
    q, k = spread(q, heads) / math.sqrt(q.shape[-1]), spread(k, states)
    state = v.new_zeros(v.shape[0], states, k.shape[-1], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        key, weight = k[:, t, :, :, None], beta[:, t][..., None, None]
        state = log_decay[:, t].exp()[..., None, None] * state
        state = state + weight * key * (v[:, t, :, None, :] - (key * state).sum(2, keepdim=True))
        outputs.append(read(q[:, t], state))
    return torch.stack(outputs, dim=1), state


def read(query, state):
    """query [B, H, D], state [B, J, D, E] -> [B, H, E]; each state is read by the queries of its group."""
    state = state.repeat_interleave(query.shape[1] // state.shape[1], dim=1)
    return (query[..., None] * state).sum(2)


class Model:
    """weights: name -> tensor, any floating type. Products run in `dtype`; norms, rotations, decays and states in
    the accumulate type (float32, or float64 when dtype is float64), rounded to `dtype` once."""

    def __init__(self, config, weights, dtype=torch.float64):
        shapes = parameter_shapes(config)
        if set(shapes) != set(weights):
            raise ValueError(f"missing {sorted(set(shapes) - set(weights))}, "
                             f"extra {sorted(set(weights) - set(shapes))}")
        for name, shape in shapes.items():
            if tuple(weights[name].shape) != shape:
                raise ValueError(f"{name}: expected {shape}, got {tuple(weights[name].shape)}")
        self.config = config
        self.dtype = dtype
        self.accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self.weights = weights
        self.states = []  # of the last forward: the recurrent state of every layer, where it has one

    def forward(self, tokens, attention_mode):
        """tokens [B, T] integers, attention_mode [T] or [B, T] booleans (False: linear) -> logits [B, T, vocabulary]."""
        self.states = []
        attention_mode = attention_mode.expand(tokens.shape)
        x = self.weights["embedding.weight"].to(self.dtype)[tokens]
        for n in range(self.config.layers):
            layer = f"layers.{n}."
            x = x + self._block(self._norm(x, layer + "mixer_norm.weight"), n, attention_mode)
            x = x + self._mlp(self._norm(x, layer + "mlp_norm.weight"), layer + "mlp.")
        return self._norm(x, "final_norm.weight") @ self.weights["embedding.weight"].to(self.dtype).T

    def _project(self, x, name):
        return x @ self.weights[name].to(self.dtype).T

    def _wide(self, name):
        return self.weights[name].to(self.accumulate)

    def _norm(self, x, name):
        return rms_norm(x.to(self.accumulate), self._wide(name)).to(self.dtype)

    def _mlp(self, x, name):
        gate = F.silu(self._project(x, name + "gate.weight").to(self.accumulate))
        up = self._project(x, name + "up.weight").to(self.accumulate)
        return self._project((gate * up).to(self.dtype), name + "down.weight")

    def _block(self, x, layer, attention_mode):
        c = self.config
        name = f"layers.{layer}.mixer."
        key = self._convolved(self._project(x, name + "key.weight"), name + "key_conv.")
        value = self._convolved(self._project(x, name + "value.weight"), name + "value_conv.")
        key = key.unflatten(-1, (c.kv_heads, c.head_dim))
        value = value.unflatten(-1, (c.value_heads, c.value_dim))
        gate = None
        if c.gate:
            gate = F.silu(self._project(x, name + "gate.weight").to(self.accumulate))
        outputs = {m: self._mix(x, key, value, name, m) for m in mixers_of(c, layer)}
        if c.hybrid == "intra_layer":
            normed = [self._gated_norm(o, gate, f"{name}{m}.norm.weight") for m, o in outputs.items()]
            output = sum(normed) / len(normed)
        else:
            output, *linear = outputs.values()
            if linear:  # the mixers are [attention, a linear one]
                output = torch.where(attention_mode[..., None, None], output, linear[0])
            output = self._gated_norm(output, gate, name + "norm.weight")
        return self._project(output.to(self.dtype), name + "output.weight")

    def _gated_norm(self, output, gate, name):
        """output [B, T, heads, D] -> [B, T, heads * D]; gate is SiLU'd already, or None."""
        c = self.config
        heads = output.shape[2:]
        output = output.to(self.dtype).to(self.accumulate).flatten(2)
        if gate is not None and c.norm_order == "after_gate":
            output = output * gate
        if c.norm == "full":
            output = rms_norm(output, self._wide(name))
        elif c.norm == "per_head":
            output = rms_norm(output.unflatten(-1, heads), self._wide(name)).flatten(2)
        if gate is not None and c.norm_order == "before_gate":
            output = output * gate
        return output.to(self.dtype).to(self.accumulate)

    def _convolved(self, x, name):
        c = self.config
        x = x.to(self.accumulate)
        if c.short_conv:
            x = short_conv(x, self._wide(name + "weight"))
            if c.conv_bias:
                x = x + self._wide(name + "bias")
        return F.silu(x) if c.conv_activation == "silu" else x

    def _mix(self, x, key, value, name, mixer):
        c = self.config
        query = self._project(x, f"{name}query.weight" if c.shared_query else f"{name}{mixer}.query.weight")
        query = self._convolved(query, name + "query_conv.") if c.query_conv else query.to(self.accumulate)
        query = query.unflatten(-1, (c.heads, c.head_dim))
        if c.query_activation[mixer] == "silu":
            query = F.silu(query)
        if c.l2_norm[mixer] == "query_key":
            query = l2_norm(query)
        if c.l2_norm[mixer] in ("key", "query_key"):
            key = l2_norm(key)
        if c.rope == "all" or (c.rope == "attention" and mixer == "attention"):
            query, key = rope(query), rope(key)
        query, key, value = (t.to(self.dtype).to(self.accumulate) for t in (query, key, value))
        if mixer == "attention":
            return attention(query, key, value)
        if mixer == "ssd":
            step = self._project(x, name + "ssd.step.weight").to(self.accumulate)
            step = F.softplus(step + self._wide(name + "ssd.step_bias"))
            output, state = ssd(query, key, value, -self._wide(name + "ssd.A_log").exp() * step, step)
            output = output + self._wide(name + "ssd.D")[:, None] * spread(value, output_heads(c))
        else:
            decay = self._project(x, name + "gated_delta.decay.weight").to(self.accumulate)
            decay = F.softplus(decay + self._wide(name + "gated_delta.decay_bias"))
            beta = self._project(x, name + "gated_delta.beta.weight").to(self.accumulate).sigmoid()
            output, state = gated_delta(query, key, value,
                                        -self._wide(name + "gated_delta.A_log").exp() * decay, beta)
        self.states.append(state)
        return output
