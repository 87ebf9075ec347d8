"""The DiT matches the published network, a student starts as its teacher, and wrong sizes are reported."""

import json
from pathlib import Path

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from decm_lightning.networks import DiT, load, save
from decm_lightning.networks.pretrained import refuse_another

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lightningdit_tiny.safetensors"
WEIGHTS = Path(__file__).parents[2] / "weights"
TINY = {"input_size": 8, "in_channels": 4, "patch_size": 1, "width": 48, "depth": 3, "heads": 4, "num_classes": 10}


def randomised(network: DiT) -> DiT:
    """Return the network in eval mode with random, non-zero trained weights."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, mean=0.05, std=0.2)
    return network.eval()


@pytest.fixture
def inputs(generator):
    """Latents, ordered times, and labels that include the null class 10."""
    x_t = torch.randn(5, 4, 8, 8, generator=generator)
    t, s = torch.rand(2, 5, generator=generator).sort(0).values
    return x_t, t, s, torch.tensor([0, 3, 9, 10, 10])


def test_network_is_lightningdit():
    """With strictly loaded weights, the output is that of the public code."""
    tensors = load_file(FIXTURE)
    network = DiT(**TINY, end_time=True).eval()
    weights = {k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")}
    network.load_state_dict(weights, strict=True)
    with torch.no_grad():
        u = network(tensors["input.x"], tensors["input.t"], tensors["input.r"], tensors["input.y"])
    torch.testing.assert_close(u, tensors["output"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("table", ["pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"])
def test_fixed_tables_are_those_of_lightningdit(table):
    """A new network has the same positions as the public weights."""
    expected = load_file(FIXTURE)[f"weight.{table}"]
    torch.testing.assert_close(DiT(**TINY).state_dict()[table], expected, rtol=0, atol=1e-6)


def test_start_and_end_time_are_not_interchangeable():
    """The output depends on the order of the times and on the labels, so the agreement above is not an accident."""
    tensors = load_file(FIXTURE)
    network = DiT(**TINY, end_time=True).eval()
    network.load_state_dict({k.removeprefix("weight."): v for k, v in tensors.items() if k.startswith("weight.")})
    x, t, s, y = (tensors[f"input.{name}"] for name in "xtry")
    with torch.no_grad():
        assert (network(x, s, t, y) - tensors["output"]).abs().max() > 1e-2
        assert (network(x, t, s, y.roll(1)) - tensors["output"]).abs().max() > 1e-2


def test_xl_has_the_published_number_of_parameters():
    """LightningDiT-XL/1 for 16 x 16 x 32 latents: 675,260,768, including the fixed positions."""
    with torch.device("meta"):
        network = DiT(16, 32, patch_size=1, width=1152, depth=28, heads=16, num_classes=1000)
    assert sum(parameter.numel() for parameter in network.parameters()) == 675_260_768


def test_student_starts_as_its_teacher_for_every_end_time(inputs):
    """The copy with an end time equals the teacher for every s."""
    x_t, t, s, labels = inputs
    teacher = randomised(DiT(**TINY))
    student = teacher.with_end_time().eval()
    expected = teacher(x_t, t, t, labels)
    assert expected.abs().max() > 0.1
    for end in (s, t, torch.zeros(5), torch.ones(5), 1 - s):
        torch.testing.assert_close(student(x_t, t, end, labels), expected, rtol=0, atol=1e-6)


def test_student_is_a_copy(inputs):
    """Training the student does not change the teacher, and afterwards u depends on s."""
    x_t, t, s, labels = inputs
    teacher = randomised(DiT(**TINY))
    before = teacher(x_t, t, t, labels)
    student = randomised(teacher.with_end_time())
    assert torch.equal(teacher(x_t, t, t, labels), before)
    assert (student(x_t, t, s, labels) - student(x_t, t, t, labels)).abs().max() > 1e-2


def test_copy_of_a_student_has_the_same_end_time_embedding(inputs):
    """The copy of a network that already embeds s is identical."""
    student = randomised(DiT(**TINY, end_time=True))
    assert torch.equal(student.with_end_time().eval()(*inputs), student(*inputs))


def test_end_time_is_trained_from_the_first_step(inputs):
    """The zero output layer has a gradient; otherwise it would stay zero."""
    student = randomised(DiT(**TINY)).with_end_time()
    student(*inputs).square().sum().backward()
    assert student.r_embedder.mlp[2].weight.grad.abs().max() > 1e-3


def test_network_without_end_time_ignores_it(inputs):
    """A teacher's velocity is bit-identical for all s."""
    x_t, t, s, labels = inputs
    teacher = randomised(DiT(**TINY))
    assert torch.equal(teacher(x_t, t, s, labels), teacher(x_t, t, t, labels))
    assert teacher.r_embedder is None


def test_new_network_is_zero(inputs):
    """With zero modulation and output layers, training starts from u = 0."""
    assert not DiT(**TINY, end_time=True)(*inputs).any()


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_unpatchify_puts_patches_back(patch_size, generator):
    """It inverts the split into patches, in which channels come last."""
    network = DiT(8, 3, patch_size=patch_size, width=48, depth=1, heads=2, num_classes=2)
    image = torch.randn(2, 3, 8, 8, generator=generator)
    tokens = rearrange(image, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)
    assert torch.equal(network.unpatchify(tokens), image)


def test_tokens_are_read_and_written_at_the_same_place(generator):
    """Without blocks, a patch of the input only affects the same patch of the output."""
    network = DiT(8, 3, patch_size=2, width=16, depth=1, heads=2, num_classes=2)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    t, labels = torch.zeros(1), torch.tensor([0])
    x_t = torch.randn(1, 3, 8, 8, generator=generator)
    changed = x_t.clone()
    changed[:, :, 2:4, 6:8] += 1
    moved = (network(changed, t, t, labels) - network(x_t, t, t, labels)).abs().sum((0, 1)) > 1e-6
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 6:8] = True
    assert torch.equal(moved, expected)


def test_rows_do_not_mix(inputs):
    """The velocity of a row does not depend on the rest of the batch."""
    network = randomised(DiT(**TINY, end_time=True))
    alone = torch.cat([network(*(part[i : i + 1] for part in inputs)) for i in range(5)])
    torch.testing.assert_close(network(*inputs), alone, rtol=0, atol=1e-4)


def test_null_is_the_class_after_the_last():
    """Unconditional rows have label num_classes."""
    network = DiT(**TINY)
    assert network.null(torch.tensor([1, 2])).tolist() == [10, 10]
    assert network.null(None) is None


def test_missing_labels_are_refused_with_the_remedy(inputs):
    """An unconditional pass needs the null class."""
    x_t, t, s, _ = inputs
    with pytest.raises(ValueError, match="null"):
        DiT(**TINY)(x_t, t, s, None)


@pytest.mark.parametrize(
    ("changed", "value"),
    [
        ({"input_size": 9, "patch_size": 2}, "got 9 and 2"),
        ({"width": 50}, "got 50 / 4"),
        ({"width": 24}, "got 24 / 4"),
        ({"heads": 5}, "got 48 / 5"),
        ({"depth": 0}, "depth must be at least 1: got 0"),
        ({"patch_size": 0}, "patch_size must be at least 1: got 0"),
        ({"in_channels": -1}, "in_channels must be at least 1: got -1"),
        ({"width": 0}, "got 0 / 4"),
    ],
)
def test_impossible_sizes_are_refused(changed, value):
    """The message contains the sizes."""
    with pytest.raises(ValueError, match=value):
        DiT(**TINY | changed)


def test_a_new_pixel_skip_adds_nothing(inputs):
    """Until it is trained, a network with the skip is the network without it."""
    torch.manual_seed(0)
    network, plain = DiT(**TINY, pixel_skip=True), DiT(**TINY)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    plain.load_state_dict({name: w for name, w in network.state_dict().items() if not name.startswith("pixel_skip")})
    assert network(*inputs).any()
    assert torch.equal(network(*inputs), plain(*inputs))


def test_noise_bypasses_narrow_tokens():
    """A width below the values of a patch: all directions of the noise reach the output, with the gain of the head."""
    network = DiT(8, 3, patch_size=8, width=16, depth=1, heads=2, num_classes=2, pixel_skip=True)
    torch.nn.init.constant_(network.pixel_skip.modulation[1].bias, -1.0)
    x_t, t, s, labels = network.example()
    torch.testing.assert_close(network(torch.ones_like(x_t), t, s, labels), -torch.ones_like(x_t))


def test_a_description_without_the_pixel_skip_is_loaded(tmp_path, inputs):
    """Networks that were saved before the argument existed have the same parameters and outputs."""
    network = randomised(DiT(**TINY))
    save(network, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("pixel_skip") is False
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = load(tmp_path)
    refuse_another(config, network, "last.ckpt")
    assert again.pixel_skip is None
    assert torch.equal(again(*inputs), network(*inputs))


@pytest.mark.parametrize("changed", [{}, {"learn_sigma": True}])
def test_a_pixel_skip_is_saved_loaded_and_given_an_end_time(changed, tmp_path, inputs):
    """The loaded network is the same, and its student equals it for every s."""
    network = randomised(DiT(**TINY, pixel_skip=True, **changed))
    save(network, tmp_path)
    again = load(tmp_path)
    x_t, t, s, labels = inputs
    u = network(*inputs)
    assert torch.equal(again(*inputs), u)
    student = again.with_end_time().eval()
    for end in (s, torch.zeros(5), torch.ones(5)):
        torch.testing.assert_close(student(x_t, t, end, labels), u, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changed", "numbers"), [({"patch_size": 8, "in_channels": 3}, "192"), ({"in_channels": 49}, "49")]
)
def test_a_width_below_the_values_of_a_patch_needs_the_pixel_skip(changed, numbers):
    """The message has both numbers and the remedies; at the width itself and with the skip nothing is refused."""
    sizes = TINY | changed
    with pytest.raises(ValueError, match=rf"width 48 .* {numbers} .*patch_size.*pixel_skip: true") as refused:
        DiT(**sizes)
    assert "\n" not in str(refused.value)
    DiT(**sizes, pixel_skip=True)
    DiT(**sizes | {"width": -(-int(numbers) // 16) * 16})


@pytest.mark.parametrize("folder", ["digits", "fashion", "emoji"])
@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_the_stored_networks_are_wide_enough(folder, kind):
    """All weights of the repository are loaded."""
    assert next(load(WEIGHTS / folder / kind).parameters()).isfinite().all()
