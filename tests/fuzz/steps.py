"""Source text of the steps that fuzzed programs are made of; ``{...}`` are names of tensors."""

from __future__ import annotations

__all__ = [
    "AFTER", "BETWEEN", "COARSE", "CORRUPTS", "DRAWS", "KEEPS", "LINEARS", "MULTIPLIES",
    "OTHER_GATES", "PLAIN_LINEARS", "PLAIN_MULTIPLIES",
    "ROW_MOVERS",
    "VALUES", "WEIGHTS", "WRITES",
]  # fmt: skip

#: How many of the first LINEARS and MULTIPLIES are gates as models have them, and how many of the
#: first CORRUPTS move rows by a transpose.
PLAIN_LINEARS, PLAIN_MULTIPLIES, ROW_MOVERS = 6, 8, 3

#: The logit `{x} -> {z}` of an input [..., H]; weight {w} [1, H], table {t} [3, H], bias {b}.
LINEARS = {
    "linear": "F.linear({x}, {w})",
    "bias": "F.linear({x}, {w}, {b}.reshape(1))",
    "bias-after": "F.linear({x}, {w}) + {b}",
    "rows": "{x}.reshape(-1, {x}.shape[-1]) @ {w}.t()",
    "sum": "({x} * {w}.reshape(-1)).sum(-1, keepdim=True)",
    "wide": "F.linear({x}.float(), {w}.float())",
    "bias-before": "{b} + {x} @ {w}.t()",
    "bias-twice": "F.linear({x}, {w}, {b}.reshape(1)) + {b}",
    "bias-scaled": "torch.add(F.linear({x}, {w}), {b}, alpha=2)",
    "bias-per-row": "F.linear({x}, {w}) + F.linear({x}, {w2}).detach()",
    "constant-after": "F.linear({x}, {w}) + 0.5",
    "matmul": "{x} @ {w}.t()",
    "mv": "{x} @ {w}.reshape(-1)",
    "mv-column": "({x} @ {w}.reshape(-1)).unsqueeze(-1)",
    "addmm": "torch.addmm({b}.reshape(1), {x}.reshape(-1, {x}.shape[-1]), {w}.t())",
    "addmm-scaled": "torch.addmm({b}.reshape(1), {x}.reshape(-1, {x}.shape[-1]), {w}.t(),"
    " beta=0.5)",
    "addmm-alpha": "torch.addmm({b}.reshape(1), {x}.reshape(-1, {x}.shape[-1]), {w}.t(),"
    " alpha=0.5)",
    "bmm": "torch.bmm({x}.reshape(1, -1, {x}.shape[-1]), {w}.t().unsqueeze(0))",
    "bmm-batches": "torch.bmm({x}.reshape({x}.shape[0], -1, {x}.shape[-1]),"
    " {w}.t().expand({x}.shape[0], -1, -1))",
    "sum-flat": "({x} * {w}).sum(-1)",
    "sum-wide": "({x}.float() * {w}.float()).sum(-1, keepdim=True).to({x}.dtype)",
    "sum-rows": "({x}.reshape(-1, {x}.shape[-1]) * {w}).sum(1, True)",
    "sum-other-dim": "({x} * {w}.reshape(-1)).sum(0, keepdim=True)",
    "sum-all": "({x} * {w}.reshape(-1)).sum().reshape(1)",
    "einsum": "torch.einsum('...h,oh->...o', {x}, {w})",
    "wide-bias": "F.linear({x}.float(), {w}.float(), {b}.reshape(1).float()).to({x}.dtype)",
    "of-table": "F.linear({x}, {t}[1:2])",
    "column-of-table": "F.linear({x}, {t})[..., 1:2]",
    "first-of-table": "F.linear({x}, {t})[..., :1]",
    "unbound": "F.linear({x}, {t}).unbind(-1)[1]",
    "padded": "(F.pad({x}.reshape(-1, {x}.shape[-1]), (0, 8))"
    " @ F.pad({w}.t(), (0, 7, 0, 8)))[:, :1]",
    "padded-ones": "(F.pad({x}.reshape(-1, {x}.shape[-1]), (0, 8), value=1.0)"
    " @ F.pad({w}.t(), (0, 7, 0, 8), value=0.5))[:, :1]",
    "affine": "F.linear({x}, {w}) * 2 - 0.5",
    "square": "F.linear({x}, {w}).square()",
    "two": "F.linear({x}, {w}) + F.linear({x}, {w2})",
    "of-product": "F.linear({x} * {w2}.reshape(-1), {w})",
}  # fmt: skip

#: Weights made of a parameter {w} [1, H] and another, {w2}.
WEIGHTS = {
    "scaled": "{w} * 2",
    "normed": "{w} * (1 + {w2})",
    "reordered": "{w}.reshape(2, -1).t().reshape(1, -1)",
    "flipped": "{w}.flip(1)",
    "cast": "{w}.to(torch.float32).to({w}.dtype)",
    "coarse": "{w}.to(torch.bfloat16).to({w}.dtype)",
    "merged": "{w} + 0.5 * {w2}",
    "column": "{w}.t().contiguous().t()",
    "cloned": "{w}.clone()",
}

#: Steps between linear, sigmoid and multiply that neither compute nor move a row. Each takes the
#: gate in any shape whose elements are one per row, in row order.
KEEPS = {
    "flatten": "{g}.reshape(-1)",
    "column": "{g}.reshape(-1, 1)",
    "row": "{g}.reshape(1, -1)",
    "cube": "{g}.reshape(2, -1, 1)",
    "unsqueeze-front": "{g}.unsqueeze(0)",
    "unsqueeze-back": "{g}.unsqueeze(-1)",
    "squeeze": "{g}.squeeze()",
    "clone": "{g}.clone()",
    "contiguous": "{g}.contiguous()",
    "swap-ones": "{g}.reshape(-1, 1, 1).transpose(1, 2)",
    "permute-ones": "{g}.reshape(1, -1, 1).permute(1, 2, 0)",
    "expand-nothing": "{g}.expand({g}.shape)",
    "float": "{g}.float()",
    "times-one": "{g} * 1",
}

#: Steps that compute or move rows.
CORRUPTS = {
    "transpose-rows": "{g}.reshape(2, -1).t().reshape(-1)",
    "permute-rows": "{g}.reshape(2, -1, 1).permute(1, 0, 2).reshape(-1)",
    "swap-lead": "{g}.transpose(0, 1).reshape({g}.shape)",
    "flip": "{g}.flip(0)",
    "roll": "{g}.reshape(-1).roll(1)",
    "halves": "torch.cat([{g}.reshape(-1)[1:], {g}.reshape(-1)[:1]])",
    "index": "{g}.reshape(-1)[{perm}]",
    "index-select": "{g}.reshape(-1).index_select(0, {perm})",
    "first-for-all": "{g}.reshape(-1)[:1].expand({g}.numel())",
    "repeat": "{g}.reshape(2, -1)[0].repeat(2)",
    "double": "{g} * 2",
    "shift": "{g} + 0.5",
    "negate": "-{g}",
    "square": "{g} * {g}",
    "tanh": "{g}.tanh()",
    "sum": "{g}.sum().expand({g}.shape)",
    "softmax": "{g}.reshape(-1).softmax(0)",
    "cumsum": "{g}.reshape(-1).cumsum(0)",
    "alternate": "{g}.reshape(-1) * torch.arange({g}.numel(), device={g}.device)",
}

#: Steps whose value jumps: a rounding above them may change what they return by much.
COARSE = {
    "sign": "{g}.sign()",
    "relu": "{g}.relu()",
    "round": "{g}.round()",
    "float8": "{g}.to(torch.float8_e5m2).to({g}.dtype)",
    "integer": "({g} * 3).to(torch.int32).to({g}.dtype)",
}

#: Products of a gate {g}, one per row, with a value {v} [..., D]; {r} is of the value's shape.
MULTIPLIES = {
    "gate-first": "{g}.reshape(*{v}.shape[:-1], 1) * {v}",
    "value-first": "{v} * {g}.reshape(*{v}.shape[:-1], 1)",
    "mul-function": "torch.mul({v}, {g}.reshape(*{v}.shape[:-1], 1))",
    "cast": "{g}.to({v}.dtype).reshape(*{v}.shape[:-1], 1) * {v}",
    "cast-back": "({g}.float().reshape(*{v}.shape[:-1], 1) * {v}.float()).to({v}.dtype)",
    "expand-as": "{g}.reshape(*{v}.shape[:-1], 1).expand_as({v}) * {v}",
    "in-place": "{v}.clone().mul_({g}.reshape(*{v}.shape[:-1], 1))",
    "unsqueezed": "{g}.reshape({v}.shape[:-1]).unsqueeze(-1) * {v}",
    "as-is": "{g} * {v}",
    "repeat": "{g}.reshape(-1, 1).repeat(1, {v}.shape[-1]).reshape({v}.shape) * {v}",
    "addcmul": "torch.addcmul({r}, {g}.reshape(*{v}.shape[:-1], 1), {v})",
    "einsum": "torch.einsum('n,nd->nd', {g}.reshape(-1), {v}.reshape(-1, {v}.shape[-1]))",
    "lerp": "{g}.reshape(*{v}.shape[:-1], 1) * {v} + (1 - {g}.reshape(*{v}.shape[:-1], 1)) * {r}",
    "torch-lerp": "torch.lerp({r}, {v}, {g}.reshape(*{v}.shape[:-1], 1).to({v}.dtype))",
    "both": "{g}.reshape(*{v}.shape[:-1], 1) * {v} + {g}.reshape(*{v}.shape[:-1], 1) * {r}",
    "twice": "{g}.reshape(*{v}.shape[:-1], 1) * ({g}.reshape(*{v}.shape[:-1], 1) * {v})",
    "broadcast-wider": "{g}.reshape(*{v}.shape[:-1], 1).unsqueeze(0) * torch.stack([{v}, {r}])",
    "value-wider": "{g}.reshape(*{v}.shape[:-1], 1, 1) * torch.stack([{v}, {r}], -2)",
    "divide": "{v} / {g}.reshape(*{v}.shape[:-1], 1)",
    "constant": "{g} * 2.5",
    "flat": "{g}.reshape(-1, 1) * {v}.reshape(-1, {v}.shape[-1])",
    "columns": "{v}.reshape(-1, {v}.shape[-1]).t() * {g}.reshape(1, -1)",
    "first-row": "{g}.reshape(-1)[:1] * {v}",
    "complement": "(1 - {g}).reshape(*{v}.shape[:-1], 1) * {v}",
}  # fmt: skip

#: Values made of one of the right shape, {v}; {r} is another, {z} any logit, {zr} it per row.
VALUES = {
    "silu": "F.silu({v})",
    "half": "{v} * 0.5",
    "sum": "{v} + {r}",
    "norm": "F.rms_norm({v}, ({v}.shape[-1],))",
    "cast": "{v}.to({other})",
    "clone": "{v}.clone()",
    "transposed": "{v}.transpose(0, -1).contiguous().transpose(0, -1)",
    "of-logit": "{v} + {zr}",
    "of-logit-2": "{v} * {zr}",
    "of-logit-3": "{r} - {v} * {zr}.tanh()",
    "of-all-logits": "{v} + {z}.float().mean().to({v}.dtype)",
    "cat": "torch.cat([{v}[..., :1], {r}[..., 1:]], -1)",
    "expanded": "{v}[..., :1].expand({v}.shape)",
    "heads": "{v}.reshape(*{v}.shape[:-1], -1, 1).squeeze(-1)",
}

#: What becomes of a gated value {y}; {r} is of its shape, {zr} one logit per row.
AFTER = {
    "add": "{r} + {y}",
    "add-2": "{y} + {r}",
    "add-3": "{r} + {y}",
    "add-in-place": "{y}.clone().add_({r})",
    "add-scaled": "torch.add({r}, {y}, alpha=0.5)",
    "add-scaled-2": "torch.add({y}, {r}, alpha=2)",
    "add-flat": "{r}.reshape(-1, {r}.shape[-1]) + {y}.reshape(-1, {y}.shape[-1])",
    "add-broadcast": "{y} + {r}.reshape(-1, {r}.shape[-1])[0]",
    "add-logit": "{y} + ({r} + {zr})",
    "add-itself": "{y} + {y}",
    "subtract": "{y} - {r}",
    "cast": "{y}.to({other})",
    "cast-add": "{y}.to({other}) + {r}.to({other})",
    "norm": "F.rms_norm({y} + {r}, ({y}.shape[-1],))",
    "rows": "{y}.reshape(-1, {y}.shape[-1])",
    "view": "{y}.unsqueeze(0)",
    "sum": "{y}.sum(-1)",
    "transposed": "{y}.transpose(0, -1)",
    "contiguous": "{y}.transpose(0, -1).contiguous()",
    "silu": "F.silu({y})",
    "matmul": "{y} @ {y}.mT",
}

#: Other uses of a logit {z} or a gate, all returned.
BETWEEN = {
    "as-it-is": "{z}",
    "as-it-is-2": "{z}",
    "clone": "{z}.clone()",
    "double": "{z} * 2",
    "tanh": "{z}.tanh()",
    "mean": "{z}.float().mean()",
    "loss": "F.softplus({z}).sum()",
    "view": "{z}.reshape(-1)",
    "other-dtype": "{z}.to({other})",
    "sigmoid-again": "{z}.sigmoid()",
    "routed": "{z}.sigmoid() / ({z}.sigmoid().sum(-1, keepdim=True) + 1)",
}

#: Random draws. Some wait for a logit {z} or a value {v}, whose numbers have no influence (Inductor
#: would fold a product with 0). Of those only Poisson and multinomial draws stay calls.
DRAWS = {
    "rand": "torch.rand({shape}, dtype={dtype}, device={device})",
    "randn": "torch.randn({shape}, dtype={dtype}, device={device})",
    "randint": "torch.randint(0, 9, {shape}, device={device})",
    "rand-like": "torch.rand_like({v}, dtype={dtype})",
    "dropout": "F.dropout(torch.ones_like({v}), 0.5, True)",
    "bernoulli": "torch.bernoulli({z}.detach().nan_to_num().clamp(0.5, 0.5))",
    "poisson": "torch.poisson({z}.detach().nan_to_num().clamp(3, 3))",
    "poisson-2": "torch.poisson({z}.detach().float().nan_to_num().clamp(3, 3))",
    "normal": "torch.normal({z}.detach().nan_to_num().clamp(0, 0), 1.0)",
    "poisson-3": "torch.poisson({zr}.detach().nan_to_num().clamp(3, 3).expand({v}.shape))",
    "poisson-value": "torch.poisson({v}.detach().nan_to_num().clamp(3, 3))",
    "randperm": "torch.randperm({rows}, device={device})",
    "multinomial": "torch.multinomial({z}.detach().reshape(-1).float().nan_to_num()"
    ".clamp(1, 1), 4, True)",
}  # fmt: skip

#: Writes to an input or an intermediate {v}.
WRITES = {
    "add": "{v}.add_(1)",
    "mul": "{v}.mul_(0.5)",
    "zero": "{v}.zero_()",
    "copy": "{v}.copy_({r})",
    "slice": "{v}[..., :1] = 0.25",
    "row": "{v}[:1].mul_(2)",
    "view": "{v}.view(-1)[:1].fill_(3)",
    "of-logit": "{v}.add_({zr})",
    "index-put": "{v}.index_fill_(0, torch.zeros(1, dtype=torch.int64, device={device}), 0.5)",
    "tanh": "{v}.tanh_()",
}

#: Gates that are no sites: {x} [..., H], {v} [..., D], weights {wh} [2, H], {wd} [D, H].
OTHER_GATES = {
    "per-head": "(F.linear({x}, {wh}).sigmoid().unsqueeze(-1)"
    " * {v}.reshape(*{v}.shape[:-1], 2, -1)).reshape({v}.shape)",
    "elementwise": "F.linear({x}, {wd}).sigmoid() * {v}",
    "router": "F.linear({x}, {wh}).sigmoid()",
    "router-scores": "F.linear({x}, {wh}).sigmoid().sum(-1, keepdim=True) * {v}",
    "softmax-router": "F.linear({x}, {wh}).softmax(-1)[..., :1] * {v}",
    "glu": "F.glu(torch.cat([{v}, {v}.tanh()], -1))",
    "swiglu": "F.silu(F.linear({x}, {wd})) * {v}",
    "exp": "{v} / (1 + (-F.linear({x}, {wh}[:1])).exp())",
}
