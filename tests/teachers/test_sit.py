"""A public SiT as a teacher: its tensors have the published names and shapes, its velocity follows the formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from decm_lightning.derivatives import Tangent, dual, functional
from decm_lightning.networks import DiT, load, save
from decm_lightning.networks.import_public import architecture
from decm_lightning.teachers import PretrainedTeacher

WIDTH, DEPTH, HEADS, PATCH, CHANNELS, SIZE, CLASSES = 24, 2, 3, 2, 3, 8, 5
SIT = {"norm": "layer", "mlp": "gelu", "rotary": False, "qk_norm": False, "learn_sigma": True}
PUBLISHED = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}


def shapes(width, depth, patch, channels, tokens, classes, outputs=2):
    """Return the names and shapes of a SiT's tensors; `outputs` is 2 with learn_sigma, 1 without."""

    def linear(name, inputs, out):
        return {f"{name}.weight": (out, inputs), f"{name}.bias": (out,)}

    found = {"pos_embed": (1, tokens, width), "y_embedder.embedding_table.weight": (classes + 1, width)}
    found |= {"x_embedder.proj.weight": (width, channels, patch, patch), "x_embedder.proj.bias": (width,)}
    found |= linear("t_embedder.mlp.0", 256, width) | linear("t_embedder.mlp.2", width, width)
    for i in range(depth):
        found |= linear(f"blocks.{i}.attn.qkv", width, 3 * width) | linear(f"blocks.{i}.attn.proj", width, width)
        found |= linear(f"blocks.{i}.mlp.fc1", width, 4 * width) | linear(f"blocks.{i}.mlp.fc2", 4 * width, width)
        found |= linear(f"blocks.{i}.adaLN_modulation.1", width, 6 * width)
    found |= linear("final_layer.linear", width, patch * patch * channels * outputs)
    return found | linear("final_layer.adaLN_modulation.1", width, 2 * width)


def weights(outputs=2):
    """Return random tensors of the small network, including positions."""
    torch.manual_seed(0)
    tokens = (SIZE // PATCH) ** 2
    named = shapes(WIDTH, DEPTH, PATCH, CHANNELS, tokens, CLASSES, outputs)
    return {name: 0.3 * torch.randn(shape) for name, shape in named.items()}


def sit(w, x, t, labels):
    """Return SiT's velocity by its formulas, written out for float64."""
    w = {name: tensor.double() for name, tensor in w.items()}

    def dense(name, h):
        return h @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(h):
        h = h - h.mean(-1, keepdim=True)
        return h / (h.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def gelu(h):
        return h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))

    def attention(name, h):
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in dense(f"{name}.qkv", h).chunk(3, -1))
        weight = (torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(WIDTH / HEADS)).softmax(-1)
        return dense(f"{name}.proj", torch.einsum("bhnm,bmhd->bnhd", weight, v).flatten(2))

    angles = t[:, None] * torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    c = dense("t_embedder.mlp.2", F.silu(dense("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))
    c = F.silu(c + w["y_embedder.embedding_table.weight"][labels])
    h = F.unfold(x, PATCH, stride=PATCH).transpose(1, 2) @ w["x_embedder.proj.weight"].flatten(1).T
    h = h + w["x_embedder.proj.bias"] + w["pos_embed"]
    for i in range(DEPTH):
        name = f"blocks.{i}"
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = dense(f"{name}.adaLN_modulation.1", c)[:, None].chunk(
            6, -1
        )
        h = h + gate_1 * attention(f"{name}.attn", norm(h) * (1 + scale_1) + shift_1)
        inner = norm(h) * (1 + scale_2) + shift_2
        h = h + gate_2 * dense(f"{name}.mlp.fc2", gelu(dense(f"{name}.mlp.fc1", inner)))
    shift, scale = dense("final_layer.adaLN_modulation.1", c)[:, None].chunk(2, -1)
    patches = dense("final_layer.linear", norm(h) * (1 + scale) + shift).unflatten(-1, (PATCH, PATCH, -1))
    # Channels come last in a patch; their first half is the velocity.
    patches = patches[..., :CHANNELS].flatten(2, 3).permute(0, 3, 2, 1).flatten(1, 2)
    return F.fold(patches, SIZE, PATCH, stride=PATCH)


@pytest.fixture
def path(tmp_path):
    """A checkpoint of the small network."""
    torch.save(weights(), tmp_path / "sit.pt")
    return str(tmp_path / "sit.pt")


@pytest.fixture
def inputs(generator):
    """Latents, times from 0 to 1, and labels that include the null class, in float64."""
    x_t = torch.randn(4, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return x_t, torch.tensor([0.0, 0.3, 0.7, 1.0], dtype=torch.float64), torch.tensor([0, 4, 5, 2])


@pytest.mark.parametrize("outputs", [1, 2], ids=["velocity alone", "learn_sigma"])
def test_velocity_is_that_of_the_formulas(outputs, inputs, tmp_path):
    torch.save(weights(outputs), tmp_path / "sit.pt")
    teacher = PretrainedTeacher(str(tmp_path / "sit.pt"), heads=HEADS)
    teacher.network.double()
    expected = sit(weights(outputs), *inputs)
    assert expected.abs().max() > 0.1
    assert (teacher(*inputs) - expected).abs().max() <= 1e-10
    assert teacher.network.config["learn_sigma"] == (outputs == 2)


LAYOUTS = [
    lambda w: w,
    lambda w: {"ema": w, "model": {}},
    lambda w: {"model": w},
    lambda w: {"state_dict": w},
    lambda w: {"model": {"state_dict": w}, "epoch": 1},
]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tensor_is_placed_wherever_it_is_in_the_file(layout, tmp_path):
    torch.save(layout({f"module.{name}": tensor for name, tensor in weights().items()}), tmp_path / "sit.pt")
    state = load(tmp_path / "sit.pt", heads=HEADS).state_dict()
    assert state.keys() == weights().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in weights().items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.mlp.fc1.bias"), r"missing: 1 \(blocks.1.mlp.fc1.bias\); unexpected: 0"),
        (
            lambda w: w.update({"projectors.0.weight": torch.zeros(2)}),
            r"missing: 0; unexpected: 1 \(projectors.0.weight",
        ),
        (lambda w: w.update({"r_embedder.mlp.0.bias": torch.zeros(24)}), r"missing: 3 \(r_embedder.mlp.0.weight"),
    ],
    ids=["one too few", "one too many", "half an end time"],
)
def test_tensors_that_do_not_fit_are_listed(change, message, path):
    found = weights()
    change(found)
    torch.save(found, path)
    with pytest.raises(ValueError, match=message):
        PretrainedTeacher(path, heads=HEADS)


def test_an_unknown_number_of_heads_must_be_passed(path):
    with pytest.raises(ValueError, match=r"sit.pt: .* 24: .*heads"):
        PretrainedTeacher(path)
    with pytest.raises(ValueError, match=r"sit.pt: width / heads must be a multiple of 4: got 24 / 0"):
        PretrainedTeacher(path, heads=0)


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_known_by_their_width(size):
    width, depth, heads = PUBLISHED[size]
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes(width, depth, 2, 4, 256, 1000).items()}
    expected = {"input_size": 32, "in_channels": 4, "patch_size": 2, "width": width, "depth": depth, "heads": heads}
    expected |= {"mlp_ratio": 4.0, "num_classes": 1000, "end_time": False, "shift": True} | SIT
    expected |= {"prediction": None, "pixel_skip": False}
    assert architecture(tensors) == expected


def test_xl_has_the_published_tensors_and_number_of_parameters():
    """SiT-XL/2 for 32 x 32 x 4 latents: 675,129,632, including the fixed positions."""
    with torch.device("meta"):
        network = DiT(32, 4, patch_size=2, **SIT)
    assert {name: tuple(v.shape) for name, v in network.state_dict().items()} == shapes(1152, 28, 2, 4, 256, 1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 675_129_632


def test_positions_of_a_new_network_are_those_of_sit():
    """Sines come before cosines, and the column is in the first half of the width, the row in the second."""
    frequencies = 10_000 ** (-torch.arange(6, dtype=torch.float64) / 6)
    expected = []
    for row in range(4):
        for column in range(4):
            parts = [f(place * frequencies) for place in (column, row) for f in (torch.sin, torch.cos)]
            expected.append(torch.cat(parts))
    network = DiT(SIZE, CHANNELS, PATCH, WIDTH, 1, HEADS, num_classes=CLASSES, **SIT)
    torch.testing.assert_close(network.pos_embed[0].double(), torch.stack(expected), rtol=0, atol=1e-7)


def test_student_initially_equals_the_teacher_for_every_end_time(path, inputs, tmp_path):
    """It is unchanged after saving and loading."""
    teacher = PretrainedTeacher(path, heads=HEADS)
    x_t, t, labels = (part.float() if part.is_floating_point() else part for part in inputs)
    v = teacher(x_t, t, labels)
    student = teacher.student()
    assert [name for name, p in student.named_parameters() if not p.requires_grad] == ["pos_embed"]
    save(student, tmp_path / "student")
    for s in (t, torch.ones(4), torch.zeros(4)):
        torch.testing.assert_close(load(tmp_path / "student")(x_t, t, s, labels), v, rtol=0, atol=1e-6)


def test_derivative_of_the_student_is_exact(path, inputs, generator):
    """The dual engine agrees with torch.func.jvp for LayerNorm, GELU and dropped channels."""
    student = PretrainedTeacher(path, heads=HEADS).student().double()
    torch.nn.init.normal_(student.r_embedder.mlp[2].weight, std=0.3)
    x_t, t, labels = inputs
    s = torch.tensor([0.5, 0.4, 1.0, 1.0], dtype=torch.float64)
    along = torch.randn(4, CHANNELS, SIZE, SIZE, generator=generator, dtype=torch.float64)
    arguments = (student, x_t, t, s, labels, Tangent(along, torch.full_like(t, 0.7), torch.full_like(t, -0.4)))
    exact, result = functional(*arguments), dual(*arguments)
    assert exact.jvp.abs().max() > 0.1
    assert (result.u - exact.u).abs().max() <= 1e-12 * exact.u.abs().max()
    assert (result.jvp - exact.jvp).abs().max() <= 1e-10 * exact.jvp.abs().max()


def test_config_names_it(fit, tmp_path):
    """One step is trained on the digits, 8 x 8 gray pixels in patches of 2, with arguments from the config."""
    torch.manual_seed(0)
    network = DiT(8, 1, 2, 16, 1, 2, num_classes=10, **SIT)
    torch.save({"ema": network.state_dict()}, tmp_path / "sit.pt")
    assert fit("PretrainedTeacher", {"path": "sit.pt", "heads": "2"}) == 0
