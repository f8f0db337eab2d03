"""Oryx as a competent PyTorch user would write it: stock PyTorch, batched operations, autograd.

The architecture and the tensor names are Oryx's, so weights load from one into the other (tests/golden compares
them). Stock PyTorch offers no attention over a subset of the queries and no linear recurrence, so

- attention is F.scaled_dot_product_attention; a training batch with both modes computes both mixers for every
  token and selects by a mask;
- the linear mixers are chunked matrix products (chunks of 64), with a loop over chunks for the state;
- decoding keeps a preallocated key/value cache and updates the recurrent state of every token.

Shape letters: B batch, T time, H heads, D head dimension, N chunks, C chunk.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

CHUNK = 64


@dataclass(frozen=True)
class PeerConfig:
    layers: int
    width: int
    heads: int
    mlp_width: int
    vocabulary: int
    linear: str | None  # "ssd" (Oryx-TM), "gated_delta" (Oryx-TG) or None (Transformer++)

    @property
    def head_dim(self):
        return self.width // self.heads


def rope_tables(positions, dim, dtype):
    accumulate = torch.promote_types(dtype, torch.float32)
    pairs = torch.arange(dim // 2, dtype=accumulate, device=positions.device)  # torch.compile misses default devices
    angle = positions[:, None].to(accumulate) * 10_000.0 ** (-pairs / (dim // 2))
    angle = angle.repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x, tables):
    """x [B, H, T, D], tables [T, D] each."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def l2_norm(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def chunked(x):
    """[B, H, T, ...] -> [B, H, N, C, ...], zeros at the end where T is no multiple of the chunk."""
    rest = -x.shape[2] % CHUNK
    if rest:
        x = torch.cat([x, x.new_zeros(*x.shape[:2], rest, *x.shape[3:])], dim=2)
    return x.unflatten(2, (-1, CHUNK))


def decay_matrix(total):
    """exp(total_i - total_j) for i >= j, else 0; total [..., C] is the cumulative log decay."""
    future = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=total.device).triu(1)
    return (total[..., :, None] - total[..., None, :]).masked_fill(future, -math.inf).exp()


def wide(x):
    """Decays, triangular solves and states are float32 at least."""
    return x if x.dtype == torch.float64 else x.float()


class ChunkedLoss(torch.autograd.Function):
    """Mean cross-entropy of logits that exist for `rows` rows at a time; their gradients are made with them."""

    @staticmethod
    def forward(context, hidden, weight, targets, rows):
        """hidden [N, W], weight [V, W], targets [N]; products are in the type of autocast where that is on."""
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow, narrow_weight = hidden.to(dtype), weight.to(dtype)
        d_hidden = torch.empty_like(narrow)
        d_weight = torch.zeros_like(weight, dtype=torch.promote_types(dtype, torch.float32))
        loss = d_weight.new_zeros(())
        for inputs, d_inputs, answers in zip(*(x.split(rows) for x in (narrow, d_hidden, targets))):
            scores = torch.log_softmax(inputs @ narrow_weight.T, -1, dtype=d_weight.dtype)
            loss -= scores.gather(1, answers[:, None]).sum()
            d_scores = scores.exp_().scatter_add_(1, answers[:, None], scores.new_full((len(answers), 1), -1)).to(dtype)
            torch.mm(d_scores, narrow_weight, out=d_inputs)
            d_weight += d_scores.T @ inputs
        context.save_for_backward(d_hidden, d_weight)
        context.types = hidden.dtype, weight.dtype
        return loss / len(targets)

    @staticmethod
    def backward(context, d_loss):
        d_hidden, d_weight = context.saved_tensors
        scale = d_loss / len(d_hidden)
        return (d_hidden * scale).to(context.types[0]), (d_weight * scale).to(context.types[1]), None, None


def ssd_chunks(q, k, v, log_decay, step, state, need_output=True):
    """q, k, v [B, H, T, D], log_decay and step [B, H, T] -> ([B, H, T, D] or None, state [B, H, D, D])."""
    time = k.shape[2]
    k, v, log_decay, step = (chunked(x) for x in (k, v, log_decay, step))
    total = log_decay.cumsum(-1)
    weighted = v * step[..., None].to(v.dtype)
    kept = (total[..., -1:] - total).exp()[..., None].to(v.dtype)
    updates = wide(k.transpose(-1, -2) @ (weighted * kept))
    decays = total[..., -1].exp()[..., None, None]
    before = []
    for decay, update in zip(decays.unbind(2), updates.unbind(2)):
        before.append(state)
        state = decay * state + update
    if not need_output:
        return None, state
    q = chunked(q)
    scores = (q @ k.transpose(-1, -2)) * decay_matrix(total).to(q.dtype)
    output = scores @ weighted
    output = output + (q @ torch.stack(before, 2).to(q.dtype)) * total.exp()[..., None].to(q.dtype)
    return output.flatten(2, 3)[:, :, :time], state


def gated_delta_chunks(q, k, v, log_decay, beta, state, need_output=True):
    """The same for the gated delta rule; k is L2-normalised, q also scaled by 1/sqrt(D)."""
    time = k.shape[2]
    k, v, log_decay, beta = (chunked(x) for x in (k, v, log_decay, beta))
    total = log_decay.cumsum(-1)
    decay = decay_matrix(total)
    weighted_k = k * beta[..., None].to(k.dtype)
    system = wide(weighted_k @ k.transpose(-1, -2)) * decay
    right = wide(torch.cat([v * beta[..., None].to(v.dtype), weighted_k * total.exp()[..., None].to(k.dtype)], -1))
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.to(v.dtype).split([v.shape[-1], k.shape[-1]], dim=-1)
    kept_k = (k * (total[..., -1:] - total).exp()[..., None].to(k.dtype)).transpose(-1, -2)
    decays = total[..., -1].exp()[..., None, None]
    pieces = [x.unbind(2) for x in (values, keys, kept_k, decays)]  # unlike indexing, cheap to differentiate
    if need_output:
        q = chunked(q)
        scores = (q @ k.transpose(-1, -2)) * decay.to(q.dtype)
        decayed_q = q * total.exp()[..., None].to(q.dtype)
        pieces += [decayed_q.unbind(2), scores.unbind(2)]
    outputs = []
    for chunk_values, chunk_keys, chunk_kept_k, chunk_decay, *read in zip(*pieces):
        narrow = state.to(k.dtype)
        new = chunk_values - chunk_keys @ narrow
        if need_output:
            chunk_q, chunk_scores = read
            outputs.append(chunk_q @ narrow + chunk_scores @ new)
        state = chunk_decay * state + wide(chunk_kept_k @ new)
    if not need_output:
        return None, state
    return torch.cat(outputs, dim=2)[:, :, :time], state


def ssd_step(q, k, v, log_decay, step, state, need_output=True):
    state.mul_(log_decay.exp()[..., None])
    state.addcmul_(wide(k).transpose(-1, -2) * step[..., None], wide(v))
    return (wide(q) @ state).to(v.dtype) if need_output else None, state


def gated_delta_step(q, k, v, log_decay, beta, state, need_output=True):
    state.mul_(log_decay.exp()[..., None])
    wide_k = wide(k)
    state.addcmul_(wide_k.transpose(-1, -2), (wide(v) - wide_k @ state) * beta[..., None])
    return (wide(q) @ state).to(v.dtype) if need_output else None, state


class State:
    """What one sequence carries: per layer a key/value cache, a recurrent state and the convolutions' tails."""

    def __init__(self, config, batch, capacity, dtype):
        shape = (batch, config.heads, capacity, config.head_dim)
        accumulate = torch.promote_types(dtype, torch.float32)
        self.position = 0
        self.layers = [dict(key=torch.zeros(shape, dtype=dtype), value=torch.zeros(shape, dtype=dtype),
                            recurrent=torch.zeros(*shape[:2], config.head_dim, config.head_dim, dtype=accumulate),
                            key_tail=torch.zeros(batch, config.width, 3, dtype=dtype),
                            value_tail=torch.zeros(batch, config.width, 3, dtype=dtype))
                       for _ in range(config.layers)]


class DepthwiseConv(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 4))

    def forward(self, x, tail):
        """x [B, T, channels]; tail [B, channels, 3], the inputs before it, is replaced by the last three.

        The result is contiguous: F.scaled_dot_product_attention has a fast path for unit strides only.
        """
        x = x.transpose(1, 2)
        if tail is None:
            y = F.conv1d(x, self.weight[:, None], padding=3, groups=x.shape[1])[..., :x.shape[2]]
            return y.transpose(1, 2).contiguous()
        x = torch.cat([tail, x], dim=2)
        tail.copy_(x[..., -3:])
        if x.shape[2] == 4:
            return (x * self.weight).sum(-1)[:, None]
        return F.conv1d(x, self.weight[:, None], groups=x.shape[1]).transpose(1, 2).contiguous()


class Linear(nn.Linear):
    def __init__(self, inputs, outputs):
        super().__init__(inputs, outputs, bias=False)


class RmsNorm(nn.RMSNorm):
    def __init__(self, channels):
        super().__init__(channels, eps=1e-5)

    def forward(self, x):
        """The fused implementation wants a weight of the input's type, which autocast does not give it."""
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class QueryOf(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.query = Linear(config.width, config.width)


class Ssd(QueryOf):
    def __init__(self, config):
        super().__init__(config)
        self.step = Linear(config.width, config.heads)
        self.step_bias = nn.Parameter(torch.empty(config.heads))
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.D = nn.Parameter(torch.empty(config.heads))

    def forward(self, x, q, k, v, state, need_output):
        step = F.softplus(wide(self.step(x)) + self.step_bias).transpose(1, 2)
        log_decay = -wide(self.A_log).exp()[:, None] * step
        mix = ssd_step if x.shape[1] == 1 and not torch.is_grad_enabled() else ssd_chunks
        output, state = mix(q, k, v, log_decay, step, state, need_output)
        if output is not None:
            output = output + self.D[:, None, None].to(v.dtype) * v
        return output, state


class GatedDelta(QueryOf):
    def __init__(self, config):
        super().__init__(config)
        self.decay = Linear(config.width, config.heads)
        self.decay_bias = nn.Parameter(torch.empty(config.heads))
        self.A_log = nn.Parameter(torch.empty(config.heads))
        self.beta = Linear(config.width, config.heads)

    def forward(self, x, q, k, v, state, need_output):
        log_decay = F.softplus(wide(self.decay(x)) + self.decay_bias).transpose(1, 2)
        log_decay = -wide(self.A_log).exp()[:, None] * log_decay
        beta = wide(self.beta(x)).sigmoid().transpose(1, 2)
        mix = gated_delta_step if x.shape[1] == 1 and not torch.is_grad_enabled() else gated_delta_chunks
        if q is not None:
            q = l2_norm(q) / math.sqrt(q.shape[-1])
        return mix(q, l2_norm(k), v, log_decay, beta, state, need_output)


class Mixer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.key, self.value, self.output = (Linear(config.width, config.width) for _ in range(3))
        self.attention = QueryOf(config)
        if config.linear:
            self.gate = Linear(config.width, config.width)
            self.key_conv, self.value_conv = DepthwiseConv(config.width), DepthwiseConv(config.width)
            full = config.linear == "ssd"
            self.norm = RmsNorm(config.width if full else config.head_dim)
            self.add_module(config.linear, Ssd(config) if full else GatedDelta(config))

    def heads(self, x):
        return x.unflatten(-1, (self.config.heads, -1)).transpose(1, 2)

    def forward(self, x, modes, tables, state, position):
        """modes: True (attention), False (linear) or a mask [B, T] (both are computed)."""
        kind = self.config.linear
        key, value = self.key(x), self.value(x)
        if kind:
            key = self.key_conv(key, state and state["key_tail"])
            value = self.value_conv(value, state and state["value_tail"])
        if kind == "gated_delta":
            key, value = F.silu(key), F.silu(value)
        key, value = self.heads(key), self.heads(value)
        rotated = rotate(key, tables)
        outputs = {}
        if modes is not False:
            query = self.attention.query(x)
            query = rotate(self.heads(F.silu(query) if kind == "gated_delta" else query), tables)
            outputs[True] = self.attend(query, rotated, value, state, position)
        elif state:
            self.extend(rotated, value, state, position)
        if kind and (modes is not True or state):
            mixer = getattr(self, kind)
            query = None
            if modes is not True:
                query = mixer.query(x)
                query = self.heads(F.silu(query)) if kind == "gated_delta" else rotate(self.heads(query), tables)
            start = state["recurrent"] if state else wide(x.new_zeros(
                x.shape[0], self.config.heads, self.config.head_dim, self.config.head_dim))
            outputs[False], end = mixer(x, query, rotated if kind == "ssd" else key, value, start,
                                        modes is not True)
            if state:
                state["recurrent"] = end
        if isinstance(modes, bool):
            output = outputs[modes]
        else:
            output = torch.where(modes[:, None, :, None], outputs[True], outputs[False])
        output = output.transpose(1, 2)
        if kind == "ssd":
            output = self.norm(output.flatten(2) * F.silu(self.gate(x)))
        elif kind == "gated_delta":
            output = self.norm(output).flatten(2) * F.silu(self.gate(x))
        else:
            output = output.flatten(2)
        return self.output(output)

    def extend(self, key, value, state, position):
        end = position + key.shape[2]
        state["key"][:, :, position:end] = key
        state["value"][:, :, position:end] = value
        return state["key"][:, :, :end], state["value"][:, :, :end]

    def attend(self, query, key, value, state, position):
        if state is None or position == 0:
            if state:
                self.extend(key, value, state, position)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True)
        key, value = self.extend(key, value, state, position)
        if query.shape[2] == 1:
            return F.scaled_dot_product_attention(query, key, value)
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(position)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


class Mlp(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate, self.up = (Linear(config.width, config.mlp_width) for _ in range(2))
        self.down = Linear(config.mlp_width, config.width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Layer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mixer_norm, self.mlp_norm = (RmsNorm(config.width) for _ in range(2))
        self.mixer = Mixer(config)
        self.mlp = Mlp(config)

    def forward(self, x, *arguments):
        x = x + self.mixer(self.mixer_norm(x), *arguments)
        return x + self.mlp(self.mlp_norm(x))


class PeerModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.final_norm = RmsNorm(config.width)
        self.initialise()

    @torch.no_grad()
    def initialise(self):
        for name, parameter in self.named_parameters():
            if name.endswith(("_bias", "A_log")):
                parameter.uniform_(-4, 0)
            elif "_conv" in name:
                parameter.uniform_(-0.5, 0.5)
            elif parameter.dim() == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02)

    def to_inference(self, dtype):
        """Matrices in `dtype`; decays stay float32 at least."""
        self.to(dtype).requires_grad_(False)
        for name, parameter in self.named_parameters():
            if name.endswith(("_bias", "A_log", ".D")):
                parameter.data = wide(parameter.data)
        return self

    def hidden(self, tokens, modes, state=None):
        """tokens [B, T]; modes: True for attention, False for linear, or a mask [B, T]. Extends `state`."""
        position = state.position if state else 0
        x = self.embedding(tokens)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        tables = rope_tables(torch.arange(position, position + tokens.shape[1]), self.config.head_dim, dtype)
        for n, layer in enumerate(self.layers):
            x = layer(x, modes, tables, state.layers[n] if state else None, position)
        if state:
            state.position += tokens.shape[1]
        return self.final_norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embedding.weight)

    def loss(self, hidden, targets, chunk_rows=None):
        """Mean cross-entropy of targets [B, T], where chunk_rows says so without logits of all tokens at once."""
        if chunk_rows:
            return ChunkedLoss.apply(hidden.flatten(0, 1), self.embedding.weight, targets.flatten(), chunk_rows)
        return F.cross_entropy(wide(self.logits(hidden)).flatten(0, 1), targets.flatten())
