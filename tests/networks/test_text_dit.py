"""The caption-conditional DiT: its formulas, masks, null caption, and exact derivative."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from decm_lightning import conditions
from decm_lightning.derivatives import Tangent, choose, dual, functional
from decm_lightning.guidance import Guidance, GuidedField
from decm_lightning.networks import DiT, TextDiT, describe, load, save
from decm_lightning.types import Captions

TINY = {"input_size": 4, "in_channels": 2, "caption_width": 6, "patch_size": 2, "width": 16, "depth": 2, "heads": 2}
ROWS, TOKENS = 4, 5


def randomised(network: nn.Module, std: float = 0.3) -> nn.Module:
    """Return the network in eval mode and float64 with random weights, none of them zero."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=std)
    return network.double().eval()


def make(end_time: bool = True, features: int = 0) -> TextDiT:
    """Return a small network in which every argument matters."""
    return randomised(TextDiT(**TINY, end_time=end_time, features=features))


def make_captions(rows: int = ROWS) -> Captions:
    """Return captions of 5, 3, 1 and no tokens."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(rows, TOKENS, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([5, 3, 1, 0])[torch.arange(rows) % 4]
    return Captions(tokens, torch.arange(TOKENS) < lengths[:, None])


def inputs(rows: int = ROWS):
    """Return x_t, ordered times and captions."""
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64)
    t, s = torch.rand(2, rows, generator=generator, dtype=torch.float64).sort(0).values
    return x_t, t, s, make_captions(rows)


def along(rows: int) -> Tangent:
    """Return a tangent of x, t and s."""
    generator = torch.Generator().manual_seed(3)
    dx = torch.randn(rows, 2, 4, 4, generator=generator, dtype=torch.float64)
    return Tangent(dx, *torch.randn(2, rows, generator=generator, dtype=torch.float64))


def by_formulas(network: TextDiT, x, t, s, captions):
    """Return u of one row, computed from the weights by the formulas; masked tokens are removed."""
    w = network.state_dict()

    def dense(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(h, name=None):
        h = h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return h if name is None else h * w[f"{name}.weight"]

    def time(name, value):
        angles = value * 10_000 ** -(torch.arange(128, dtype=torch.float64) / 128)
        return dense(f"{name}.mlp.2", F.silu(dense(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()]))))

    def turn(h):
        # Head size 8: two frequencies for the row of the 2 x 2 grid, two for the column; pairs are complex numbers.
        angles = torch.tensor([[r, r / 100, c, c / 100] for r in range(2) for c in range(2)], dtype=torch.float64)
        turned = torch.view_as_complex(h.unflatten(-1, (4, 2)).contiguous()) * torch.exp(1j * angles)
        return torch.view_as_real(turned).flatten(-2)

    def heads(h):
        return h.unflatten(-1, (2, 8)).transpose(0, 1)

    def mix(name, q, k, v):
        weights = ((q @ k.transpose(-1, -2)) / math.sqrt(8)).softmax(-1)
        return dense(f"{name}.proj", (weights @ v).transpose(0, 1).flatten(1))

    kept = captions.tokens[0][captions.mask[0]]
    kept = rms(kept, "caption_embedder.norm")
    mean = kept.mean(0) if len(kept) else torch.zeros(6, dtype=torch.float64)
    summary = dense("caption_embedder.summary.2", F.silu(dense("caption_embedder.summary.0", mean)))
    context = torch.cat([w["caption_embedder.first"][0], dense("caption_embedder.proj", kept)])
    c = F.silu(time("t_embedder", t) + time("r_embedder", s) + summary)
    patches = x[0].unflatten(2, (2, 2)).unflatten(1, (2, 2)).permute(1, 3, 0, 2, 4).reshape(4, 8)
    h = patches @ w["x_embedder.proj.weight"].flatten(1).T + w["x_embedder.proj.bias"] + w["pos_embed"][0]
    for i in range(2):
        name = f"blocks.{i}"
        parts = dense(f"{name}.adaLN_modulation.1", c).split(16)
        inner = rms(h, f"{name}.norm1") * (1 + parts[1]) + parts[0]
        q, k, v = map(heads, dense(f"{name}.attn.qkv", inner).split(16, -1))
        q, k = turn(rms(q, f"{name}.attn.q_norm")), turn(rms(k, f"{name}.attn.k_norm"))
        h = h + parts[2] * mix(f"{name}.attn", q, k, v)
        inner = rms(h, f"{name}.norm2") * (1 + parts[4]) + parts[3]
        k, v = map(heads, dense(f"{name}.cross.kv", context).split(16, -1))
        q, k = rms(heads(dense(f"{name}.cross.q", inner)), f"{name}.cross.q_norm"), rms(k, f"{name}.cross.k_norm")
        h = h + parts[5] * mix(f"{name}.cross", q, k, v)
        inner = rms(h, f"{name}.norm3") * (1 + parts[7]) + parts[6]
        gate, value = dense(f"{name}.mlp.w12", inner).chunk(2, -1)
        h = h + parts[8] * dense(f"{name}.mlp.w3", F.silu(gate) * value)
    shift, scale = dense("final_layer.adaLN_modulation.1", c).chunk(2)
    out = dense("final_layer.linear", rms(h, "final_layer.norm_final") * (1 + scale) + shift)
    return out.view(2, 2, 2, 2, 2).permute(4, 0, 2, 1, 3).reshape(1, 2, 4, 4)


def close(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * expected.abs().max().item())


def test_network_is_its_formulas():
    """Each row agrees in float64 with a computation that removes masked tokens."""
    network, (x_t, t, s, captions) = make(), inputs()
    u = network(x_t, t, s, captions)
    assert u.abs().max() > 0.1
    for row in range(ROWS):
        one = slice(row, row + 1)
        expected = by_formulas(network, x_t[one], t[row], s[row], conditions.select(captions, one))
        # The angles of the rotary positions are rounded to float32.
        close(u[one], expected, 1e-9)


def test_a_pixel_skip_is_its_formulas():
    """The head is computed pixel by pixel from the output of the same weights without it."""
    network, (x_t, t, s, captions) = make(features=5), inputs()
    plain = make()
    plain.load_state_dict({name: w for name, w in network.state_dict().items() if not name.startswith("pixel_skip")})
    w = network.pixel_skip.state_dict()
    row = slice(1, 2)
    image = plain(x_t[row], t[row], s[row], conditions.select(captions, row))[0]

    def convolved(name, h):
        padded = F.pad(h, (1, 1, 1, 1))
        moved = [padded[:, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
        kernel = w[f"{name}.weight"].flatten(2)
        return (
            sum(torch.einsum("oc,chw->ohw", kernel[..., k], h) for k, h in enumerate(moved))
            + w[f"{name}.bias"][:, None, None]
        )

    context = network.caption_embedder(captions).mean
    embedding = (network.t_embedder(t) + network.r_embedder(s) + context)[1]
    gain, shift, scale = (F.silu(embedding) @ w["modulation.1.weight"].T + w["modulation.1.bias"])[:, None, None].split(
        [2, 5, 5]
    )
    features = convolved("enter", torch.cat([image, x_t[1]])) * (1 + scale) + shift
    expected = image + gain * x_t[1] + convolved("leave", F.silu(convolved("inner", F.silu(features))))
    assert (expected - image).abs().max() > 0.1
    close(network(x_t, t, s, captions)[1], expected)


def test_a_new_pixel_skip_adds_nothing():
    network, plain = TextDiT(**TINY, features=3).double(), TextDiT(**TINY).double()
    nn.init.normal_(network.final_layer.linear.weight)
    plain.load_state_dict({name: w for name, w in network.state_dict().items() if not name.startswith("pixel_skip")})
    arguments = inputs()
    assert network(*arguments).any()
    assert torch.equal(network(*arguments), plain(*arguments))


def test_masked_tokens_have_no_influence_at_all():
    """u and its gradients are bit-identical even if masked tokens are NaN; other tokens have an influence."""
    network, (x_t, t, s, captions) = make(), inputs()
    hidden = ~captions.mask[..., None]
    spoilt = captions._replace(tokens=captions.tokens.masked_fill(hidden, float("nan")))
    results = []
    for given in (captions, spoilt):
        network.zero_grad()
        u = network(x_t, t, s, given)
        u.square().sum().backward()
        results.append([u.detach(), *(p.grad for p in network.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    moved = (network(x_t, t, s, captions._replace(tokens=captions.tokens + 1)) - results[0][0]).flatten(1)
    # The caption of the last row has no tokens.
    assert (moved.abs().amax(1) > 1e-3).tolist() == [True, True, True, False]


def test_a_caption_is_the_same_padded_or_not_and_in_any_order():
    """Neither padding nor the order of tokens changes the output, because positions are part of the text encoder."""
    network, (x_t, t, s, captions) = make(), inputs()
    u = network(x_t, t, s, captions)
    longer = Captions(F.pad(captions.tokens, (0, 0, 0, 7), value=9.0), F.pad(captions.mask, (0, 7)))
    close(network(x_t, t, s, longer), u)
    order = torch.tensor([3, 0, 4, 2, 1])
    close(network(x_t, t, s, Captions(captions.tokens[:, order], captions.mask[:, order])), u)
    full = conditions.select(captions, slice(1))
    close(network(x_t[:1], t[:1], s[:1], full._replace(mask=None)), u[:1])


def test_the_null_caption_is_learnt_and_the_same_for_all():
    """Null rows do not depend on their caption, are finite, and train the learned token."""
    network, (x_t, t, s, captions) = make(), inputs()
    same = [value[:1].expand(ROWS, *value.shape[1:]) for value in (x_t, t, s)]
    u = network(*same, network.null(captions))
    assert u.isfinite().all()
    close(u, u[:1].expand_as(u))
    assert (network(*same, captions)[:3] - u[:3]).abs().amax((1, 2, 3)).min() > 1e-3
    u.square().sum().backward()
    assert network.caption_embedder.first.grad.abs().max() > 1e-6
    network.caption_embedder.first.data += 1
    assert (network(*same, network.null(captions)) - u).abs().max() > 1e-3


def test_null_captions_join_with_others_for_guidance():
    """Guidance is v_cond + (w - 1) (v_cond - v_null) in one call of the network."""
    network, (x_t, t, _, captions) = make(), inputs()
    field = GuidedField(lambda x, time, given: network(x, time, time, given), network.null, Guidance(2.5))
    v_cond, v_null = network(x_t, t, t, captions), network(x_t, t, t, network.null(captions))
    close(field(x_t, t, captions), v_cond + 1.5 * (v_cond - v_null))
    dropped = torch.tensor([True, False, True, False])
    mixed = network(x_t, t, t, conditions.where(dropped, network.null(captions), captions))
    close(mixed, torch.where(dropped[:, None, None, None], v_null, v_cond))


def test_rows_do_not_mix():
    """The velocity of a row does not depend on the rest of the batch."""
    network, (x_t, t, s, captions) = make(), inputs()
    rows = [slice(row, row + 1) for row in range(ROWS)]
    alone = [network(x_t[row], t[row], s[row], conditions.select(captions, row)) for row in rows]
    close(torch.cat(alone), network(x_t, t, s, captions))


def test_student_starts_as_its_teacher_for_every_landing_time():
    """The copy with an end time equals the teacher for every s. After training, copies have the same embedding of s."""
    teacher, (x_t, t, s, captions) = make(end_time=False), inputs()
    expected = teacher(x_t, t, t, captions)
    assert torch.equal(teacher(x_t, t, s, captions), expected)
    student = teacher.with_end_time().eval()
    for end in (s, torch.zeros_like(s), torch.ones_like(s)):
        close(student(x_t, t, end, captions), expected)
    student(x_t, t, s, captions).square().sum().backward()
    assert student.r_embedder.mlp[2].weight.grad.abs().max() > 1e-3
    trained = make()
    assert torch.equal(trained.with_end_time().eval()(x_t, t, s, captions), trained(x_t, t, s, captions))
    assert (trained(x_t, t, s, captions) - trained(x_t, t, t, captions)).abs().max() > 1e-2


def test_new_network_is_zero():
    """With zero modulation and output layers, training starts from u = 0."""
    assert not TextDiT(**TINY).double()(*inputs()).any()


@pytest.mark.parametrize(
    ("rows", "checkpointed", "features"), [(2, False, 0), (4, True, 0), (4, False, 5), (2, True, 5)]
)
def test_dual_engine_is_exact(rows, checkpointed, features):
    """u and its gradients are bit-identical, and jvp agrees with torch.func.jvp in float64, including null rows."""
    network, arguments = make(features=features), inputs()
    exact = functional(network, *arguments, along(rows)).jvp
    assert exact.abs().max() > 0.1
    network.gradient_checkpointing = checkpointed
    gradients = []
    for u in (dual(network, *arguments, along(rows)).u, network(*arguments)):
        network.zero_grad()
        u.square().sum().backward()
        gradients.append([u.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    jvp = dual(network, *arguments, along(rows)).jvp
    assert len(jvp) == rows
    close(jvp, exact)


@pytest.mark.compiled
@pytest.mark.parametrize("checkpointed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_dual_engine_is_exact_when_compiled(checkpointed):
    """Blocks compile without graph breaks, and u, jvp and gradients agree with an eager pass."""
    torch.compiler.reset()
    results = []
    for backend in (None, "aot_eager"):
        network = make()
        network.gradient_checkpointing = checkpointed
        for unit in network.units() if backend else ():
            unit.forward = torch.compile(unit.forward, fullgraph=True, backend=backend)
        result = dual(network, *inputs(), along(3))
        result.u.square().sum().backward()
        results.append([result.u.detach(), result.jvp, *(p.grad for p in network.parameters() if p.grad is not None)])
    torch.compiler.reset()
    for actual, expected in zip(results[1], results[0], strict=True):
        close(actual, expected)


def test_dual_engine_is_chosen_by_the_networks_own_example():
    """The forward pass works on the meta device."""
    network = TextDiT(**TINY)
    assert choose(network, network.example()).name == "dual"
    assert network(*network.example()).shape == (2, 2, 4, 4)


def test_a_saved_network_is_loaded_as_it_was(tmp_path):
    """The config names its class and arguments."""
    network = make().float()
    arguments = [value.float() for value in inputs()[:3]]
    save(network, tmp_path)
    again = load(tmp_path)
    assert describe(again) == describe(network) == {"_class_name": "TextDiT", **network.config}
    assert torch.equal(again(*arguments, make_captions()), network(*arguments, make_captions()))


def test_other_conditions_are_refused_with_the_remedy():
    """Labels, None, tokens of another encoder, and captions without a mask for the null caption."""
    network, (x_t, t, s, captions) = make(), inputs()
    for condition in (None, torch.zeros(ROWS, dtype=torch.long)):
        with pytest.raises(ValueError, match="TextDiT needs Captions"):
            network(x_t, t, s, condition)
    with pytest.raises(ValueError, match=r"must be \(b, n, 6\): got \(4, 5, 3\)"):
        network(x_t, t, s, captions._replace(tokens=captions.tokens[..., :3]))
    with pytest.raises(ValueError, match="needs a mask"):
        network.null(captions._replace(mask=None))


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ({"input_size": 5}, "got 5 and 2"),
        ({"width": 20, "heads": 3}, "got 20 / 3"),
        ({"width": 12}, "got 12 / 2"),
        ({"in_channels": 5}, "width 16 .* 20 .*features: 32"),
        ({"depth": 0}, "depth must be at least 1: got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1: got 0"),
    ],
)
def test_impossible_sizes_are_refused(changed, value):
    """The message contains the sizes."""
    with pytest.raises(ValueError, match=value):
        TextDiT(**TINY | changed)


def test_a_caption_costs_few_parameters_more_than_a_class():
    """It has the parameters of a DiT plus cross-attention (4 width^2) and its modulation (3 width^2) in each block."""
    width, depth, caption = 64, 3, 32
    shared = {"input_size": 8, "in_channels": 3, "patch_size": 2, "width": width, "depth": depth, "heads": 4}
    count = [
        sum(p.numel() for p in network.parameters())
        for network in (TextDiT(caption_width=caption, **shared), DiT(num_classes=1, **shared))
    ]
    cross = 4 * width**2 + 4 * width + 2 * 16 + width + 3 * width**2 + 3 * width
    embedding = caption + 2 * (caption + 1) * width + (width + 1) * width + width - 2 * width
    assert count[0] - count[1] == depth * cross + embedding
