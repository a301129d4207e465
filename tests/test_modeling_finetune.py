"""The classifier against Hugging Face's VideoMAE with the same weights, against the released parameter names and
shapes, and its parts against computations by hand.
"""

import math

import pytest
import timm
import torch
import torch.nn.functional as F
from test_modeling_pretrain import MINI, blocks, clip_and_mask, randomize, their_config, to_hugging_face
from transformers import VideoMAEForVideoClassification

from modeling_finetune import MODELS, Attention, Size, TubeletEmbed, VisionTransformer, token_grid
from modeling_pretrain import PretrainVisionTransformer

# frames, height, width
SHAPES = [(16, 32, 32), (8, 64, 64), (6, 32, 80), (4, 96, 48), (2, 16, 16), (32, 16, 32)]


def random_classifier(size=MINI, **kwargs):
    return randomize(VisionTransformer(size, **{"num_classes": 7, **kwargs}))


def random_clips(num_frames, height, width, batch=2):
    return torch.randn(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------------- Hugging Face


def with_their_names(state):
    """Our parameter names → theirs."""
    own = ("fc_norm", "head")
    state = {name if name.startswith(own) else f"encoder.{name}": value for name, value in state.items()}
    return {name.replace("head.", "classifier."): value for name, value in to_hugging_face(state).items()}


def hugging_face_twin(model, num_frames, height, width):
    config = their_config(num_frames, height, width, use_mean_pooling=True, num_labels=7)
    twin = VideoMAEForVideoClassification(config).eval()
    twin.fc_norm.eps = 1e-6  # theirs is PyTorch's default, VideoMAE's own code has 1e-6
    twin.load_state_dict(with_their_names(model.state_dict()), strict=True)
    return twin


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_hugging_face(shape):
    model, clips = random_classifier(), random_clips(*shape)
    with torch.no_grad():
        ours, theirs = model(clips), hugging_face_twin(model, *shape)(clips.transpose(1, 2)).logits
    assert ours.shape == (2, 7) and ours.std() > 0.1 and (ours[0] - ours[1]).abs().max() > 0.05
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_gradients_equal_hugging_face():
    model, clips, labels = random_classifier(), random_clips(8, 32, 48), torch.tensor([3, 6])
    twin = hugging_face_twin(model, 8, 32, 48)
    F.cross_entropy(model(clips), labels).backward()
    twin(clips.transpose(1, 2), labels=labels).loss.backward()
    theirs = dict(twin.named_parameters())
    ours = with_their_names({name: p.grad for name, p in model.named_parameters()})
    assert ours.keys() == {name for name in theirs if not name.endswith("key.bias")}
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name].grad, atol=1e-5, rtol=1e-3, msg=name)


# ------------------------------------------------------------------------------------------------ released checkpoints

# size: width, depth, heads, tensors
RELEASED = {
    "small": (384, 12, 6, 162),
    "base": (768, 12, 12, 162),
    "large": (1024, 24, 16, 318),
    "huge": (1280, 32, 16, 422),
}


def released_shapes(width, depth, num_classes):
    """Names and shapes of the tensors in the released files."""
    return {
        "patch_embed.proj.weight": (width, 3, 2, 16, 16),
        "patch_embed.proj.bias": (width,),
        **blocks("", width, depth),
        "fc_norm.weight": (width,),
        "fc_norm.bias": (width,),
        "head.weight": (num_classes, width),
        "head.bias": (num_classes,),
    }


@pytest.mark.parametrize("size", RELEASED)
def test_names_and_shapes_equal_the_released_ones(size):
    width, depth, heads, number = RELEASED[size]
    with torch.device("meta"):
        model = MODELS[f"vit_{size}_patch16_224"](num_classes=400)
    ours = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert ours == released_shapes(width, depth, 400) and len(ours) == number
    assert {block.attn.num_heads for block in model.blocks} == {heads}  # they leave no trace in the shapes
    assert (model.embed_dim, len(model.blocks)) == (width, depth)


def test_our_names_are_not_in_the_registry_of_timm():
    assert MODELS.keys() == {f"vit_{size}_patch16_224" for size in ("tiny", *RELEASED)}
    for name in MODELS:
        assert not timm.is_model(name) or timm.model_entrypoint(name).__module__.startswith("timm.")


# --------------------------------------------------------------------------------------------------------------- parts


def test_attention_equals_softmax_by_hand():
    torch.manual_seed(0)
    dim, heads = 24, 4
    attention, x = Attention(dim, heads), torch.randn(2, 10, dim)
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.normal_()
    wq, wk, wv = attention.qkv.weight.chunk(3)
    q, k, v = x @ wq.T + attention.q_bias, x @ wk.T, x @ wv.T + attention.v_bias
    by_hand = []
    for clip in range(2):
        of_heads = []
        for head in range(heads):
            part = slice(head * 6, head * 6 + 6)
            scores = q[clip, :, part] @ k[clip, :, part].T / math.sqrt(6)
            weights = (scores - scores.max(dim=1, keepdim=True).values).exp()
            of_heads.append(weights / weights.sum(dim=1, keepdim=True) @ v[clip, :, part])
        by_hand.append(torch.cat(of_heads, dim=1) @ attention.proj.weight.T + attention.proj.bias)
    torch.testing.assert_close(attention(x), torch.stack(by_hand), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_tubelets_are_embedded_as_by_the_convolution(shape):
    """And come in the order time, row, column."""
    torch.manual_seed(0)
    embed, clips = TubeletEmbed(20), random_clips(*shape)
    by_convolution = embed.proj(clips)
    torch.testing.assert_close(embed(clips), by_convolution.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    assert by_convolution.shape[2:] == token_grid(*shape)


@pytest.mark.parametrize("frames, height, width", [(15, 224, 224), (0, 224, 224), (16, 224, 100), (16, 0, 224)])
def test_a_clip_that_tubelets_do_not_divide(frames, height, width):
    named = f"num_frames {frames}" if frames != 16 else f"input_size {height if width == 224 else width}"
    with pytest.raises(ValueError, match=named):
        token_grid(frames, height, width)


def test_features_are_the_normalised_mean_of_the_tokens():
    model, clips = random_classifier(num_classes=0), random_clips(8, 32, 48)
    with torch.no_grad():
        tokens, features = model.forward_tokens(clips), model(clips)
    assert tokens.shape == (2, 24, 48)
    mean = tokens.mean(dim=1)
    normed = (mean - mean.mean(dim=1, keepdim=True)) / (mean.var(dim=1, correction=0, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(features, normed * model.fc_norm.weight + model.fc_norm.bias, atol=1e-5, rtol=1e-5)
    assert not [name for name in model.state_dict() if name.startswith("head")]


# ------------------------------------------------------------------------------ training of classifier and student

BOTH = {
    "classifier": random_classifier,
    "student": lambda *sizes, **kwargs: randomize(PretrainVisionTransformer(*(sizes or (MINI, 2)), **kwargs)),
}
CLIPS, MASK = clip_and_mask(8, 32, 48, 15, batch=3)
INPUTS = {"classifier": (CLIPS,), "student": (CLIPS, MASK)}


@pytest.mark.parametrize("init_scale", [0.001, 1.0])
def test_initial_weights(init_scale):
    torch.manual_seed(0)
    model = MODELS["vit_tiny_patch16_224"](num_classes=400, init_scale=init_scale)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all(), name
        elif name.endswith("bias") and "patch_embed" not in name:
            assert (parameter == 0).all(), name
        elif parameter.ndim == 2:
            std = 0.02 * (init_scale if name == "head.weight" else 1)
            assert parameter.std().item() == pytest.approx(std, rel=0.02), name
            assert abs(parameter.mean().item()) < 0.02 * std, name


def test_drop_path_grows_over_the_blocks():
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in random_classifier(drop_path_rate=0.2).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2])


@pytest.mark.parametrize("rate", ["drop_rate", "attn_drop_rate", "drop_path_rate", "fc_drop_rate"])
def test_every_dropout_acts_in_training_only(rate):
    model, clips = random_classifier(**{rate: 0.5}), random_clips(8, 32, 48)
    with torch.no_grad():
        torch.testing.assert_close(model(clips), random_classifier()(clips), atol=1e-6, rtol=0)
        model.train()
        assert (model(clips) - model(clips)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", BOTH)
def test_clips_of_a_batch_do_not_mix(kind):
    model, inputs = BOTH[kind](), INPUTS[kind]
    with torch.no_grad():
        alone = model(*(values[1:2] for values in inputs))
        torch.testing.assert_close(model(*inputs)[1:2], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", BOTH)
def test_activation_checkpointing_gives_the_same_gradients(kind):
    results = []
    for use_checkpoint in (False, True):
        model = BOTH[kind](use_checkpoint=use_checkpoint).train()
        output = model(*INPUTS[kind])
        output.square().mean().backward()
        results.append([output.detach(), *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*results):
        torch.testing.assert_close(plain, checkpointed, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, sizes, most",
    [
        ("classifier", (MINI,), 0.5),
        ("student", (Size(48, 4, 4, 24, 3), 1), 0.7),  # nearly all is in the encoder
        ("student", (Size(24, 1, 3, 48, 4), 4), 0.7),  # and in the decoder
    ],
)
def test_activation_checkpointing_keeps_fewer_activations(kind, sizes, most):
    """Kept are the inputs of blocks, and everything outside them."""
    saved = []
    for use_checkpoint in (False, True):
        model, numbers = BOTH[kind](*sizes, use_checkpoint=use_checkpoint).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (numbers.append(x.numel()), x)[1], lambda x: x):
            model(*INPUTS[kind])
        saved.append(sum(numbers))
    assert saved[1] < most * saved[0]


@pytest.mark.parametrize("kind", BOTH)
def test_every_parameter_learns(kind):
    """Distributed training needs it: a parameter without gradient stops it."""
    model = BOTH[kind](drop_path_rate=0.1).train()
    model(*INPUTS[kind]).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


@torch.no_grad()
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_leaves_the_model_as_it_was(strict):
    """Whether the model has run before or not: what the exported program, and then the model, say is the same."""
    clips = torch.randn(2, 3, 6, 32, 48, generator=torch.Generator().manual_seed(0))  # a grid of no other test
    mask = torch.arange(18).expand(2, -1) % 2 == 0
    for model, inputs in ((random_classifier(), (clips,)), (PretrainVisionTransformer(MINI), (clips, mask, 9))):
        model.eval()
        for _ in range(2):
            exported = torch.export.export(model, inputs, strict=strict).module()(*inputs)
            assert type(model(*inputs)) is torch.Tensor
            torch.testing.assert_close(exported, model(*inputs), atol=1e-6, rtol=0)
